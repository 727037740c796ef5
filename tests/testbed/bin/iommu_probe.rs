//! `iommu-probe [FUNCTION]`: what the kernel reports about a function and its IOMMU, one `key=value` per line.

use std::process::ExitCode;

fn main() -> ExitCode {
    let function = std::env::args().nth(1).unwrap_or_else(|| "0000:00:04.0".into());
    match testbed::iommu::ask(&function) {
        Ok(answers) => {
            for (key, value) in answers {
                println!("{key}={value}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("iommu-probe: {function}: {error}");
            ExitCode::FAILURE
        }
    }
}
