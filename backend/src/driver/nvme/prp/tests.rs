//! The arithmetic against a model of single bytes: the addresses of the transfer, in order, must be those that a controller
//! accesses when it walks the PRPs.

use proptest::prelude::*;

use super::*;

const BIG_LIST: Iova = Iova(0xffff_0000_0000_0000);

fn span(start: u64, len: u64) -> Span<Iova> {
    Span::new(Iova(start), len).unwrap()
}

fn limits(block: u32, transfer: u32) -> Limits {
    Limits { block, transfer }
}

/// The address of every byte of the buffers.
fn addresses(buffers: &[Span<Iova>]) -> Vec<u64> {
    buffers.iter().flat_map(|buffer| (0..buffer.len()).map(|i| buffer.start().raw() + i)).collect()
}

/// The address of every byte that a controller accesses, or why it would refuse the PRPs. NVMe 2.0 §4.1.1
fn walk(prp1: u64, prp2: u64, list: &[u64], bytes: u64) -> Result<Vec<u64>, String> {
    if !prp1.is_multiple_of(4) {
        return Err(format!("PRP1 {prp1:#x} is not dword-aligned"));
    }
    let first = bytes.min(4096 - prp1 % 4096);
    let mut touched: Vec<u64> = (prp1..prp1 + first).collect();
    let mut left = bytes - first;
    let pages = if left > 4096 { list.to_vec() } else { vec![prp2] };
    if left > 4096 && prp2 != BIG_LIST.raw() {
        return Err(format!("PRP2 {prp2:#x} is not the list"));
    }
    let mut pages = pages.into_iter();
    while left > 0 {
        let page = pages.next().ok_or("the list is too short")?;
        if !page.is_multiple_of(4096) {
            return Err(format!("entry {page:#x} has an offset"));
        }
        let segment = left.min(4096);
        touched.extend(page..page + segment);
        left -= segment;
    }
    match pages.next() {
        Some(extra) if bytes > 4096 => Err(format!("an entry too many: {extra:#x}")),
        _ => Ok(touched),
    }
}

fn build_and_walk(buffers: &[Span<Iova>], position: u64, bytes: u32) -> Result<Vec<u64>, String> {
    let mut list = Vec::new();
    let (prp1, prp2) = build(buffers, position, bytes, BIG_LIST, |index, entry| {
        assert_eq!(index as usize, list.len(), "entries are put in order");
        list.push(entry);
    });
    walk(prp1, prp2, &list, u64::from(bytes))
}

/// True if PRPs can describe these addresses: slow and obvious.
fn describable(addresses: &[u64]) -> bool {
    let page = |address: u64| address.is_multiple_of(4096);
    let jump_is_legal = |pair: &[u64]| pair[1] == pair[0] + 1 || (page(pair[0] + 1) && page(pair[1]));
    addresses.first().is_none_or(|first| first.is_multiple_of(4)) && addresses.windows(2).all(jump_is_legal)
}

/// The longest direct extent, found by trying every number of blocks.
fn longest(addresses: &[u64], limits: Limits) -> u32 {
    (1..)
        .map(|n| n * limits.block)
        .take_while(|&bytes| bytes <= limits.transfer && bytes as usize <= addresses.len())
        .filter(|&bytes| describable(&addresses[..bytes as usize]))
        .last()
        .unwrap_or(0)
}

/// Buffers as guests use them: mostly whole pages, sometimes contiguous, unaligned, or tiny.
fn buffers(block: u64) -> impl Strategy<Value = Vec<Span<Iova>>> {
    let start = prop_oneof![
        4 => Just(0_u64),
        2 => (0..8_u64).prop_map(|i| i * 512),
        1 => 0..4096_u64,
        1 => (0..1024_u64).prop_map(|i| i * 4),
    ];
    let len = prop_oneof![
        4 => (1..4_u64).prop_map(|pages| pages * 4096),
        2 => (1..16_u64).prop_map(|sectors| sectors * 512),
        1 => 1..6000_u64,
    ];
    let shape = prop_oneof![4 => Just(0_u8), 2 => Just(1), 2 => Just(2)];
    prop::collection::vec((start, len, shape), 1..8).prop_map(move |pieces| {
        let mut spans: Vec<Span<Iova>> = Vec::new();
        let mut page = 0x10_0000;
        for (offset, len, shape) in pieces {
            let start = match (shape, spans.last()) {
                // Contiguous to the one before, or up to the end of the page, so that long extents are common.
                (1, Some(last)) => last.last().raw() + 1,
                _ => page + offset,
            };
            let len = if shape == 2 { 4096 - start % 4096 } else { len };
            spans.push(span(start, len));
            page = (start + len + 0x2000) & !0xfff;
        }
        let total: u64 = spans.iter().map(Span::len).sum();
        if !total.is_multiple_of(block) {
            let last = spans.pop().unwrap();
            spans.push(span(last.start().raw(), last.len() + block - total % block));
        }
        spans
    })
}

fn cases() -> impl Strategy<Value = (Vec<Span<Iova>>, u64, Limits)> {
    let block = prop_oneof![Just(512_u32), Just(4096)];
    let transfer = prop_oneof![Just(4096_u32), Just(16384), Just(MAX_TRANSFER)];
    (block, transfer).prop_flat_map(|(block, transfer)| {
        (buffers(u64::from(block)), any::<prop::sample::Index>()).prop_map(move |(buffers, index)| {
            let blocks = buffers.iter().map(Span::len).sum::<u64>() / u64::from(block);
            let position = index.index(usize::try_from(blocks).unwrap()) as u64 * u64::from(block);
            (buffers, position, limits(block, transfer))
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn extents_are_the_longest_and_prps_describe_exactly_their_bytes((buffers, position, limits) in cases()) {
        let wanted = addresses(&buffers)[usize::try_from(position).unwrap()..].to_vec();
        let bounce_limit = 8192;

        let extent = extent(&buffers, position, limits, bounce_limit);

        let longest = longest(&wanted, limits);
        prop_assert_eq!(extent.direct, longest != 0);
        if extent.direct {
            prop_assert_eq!(extent.bytes, longest);
            let touched = build_and_walk(&buffers, position, extent.bytes);
            prop_assert_eq!(touched.as_deref(), Ok(&wanted[..extent.bytes as usize]));
        } else {
            let most = wanted.len().min(bounce_limit as usize).min(limits.transfer as usize);
            prop_assert_eq!(extent.bytes as usize, most - most % limits.block as usize);
        }
    }

    #[test]
    fn successive_extents_cover_every_byte_once((buffers, _, limits) in cases()) {
        let all = addresses(&buffers);
        let mut position = 0;
        let mut seen = Vec::new();
        while position < all.len() as u64 {
            let extent = extent(&buffers, position, limits, 4096);
            prop_assert!(extent.bytes >= limits.block && extent.bytes.is_multiple_of(limits.block));
            let at = usize::try_from(position).unwrap();
            let bytes = &all[at..at + extent.bytes as usize];
            if extent.direct {
                seen.extend(build_and_walk(&buffers, position, extent.bytes).map_err(TestCaseError::fail)?);
            } else {
                seen.extend(bytes);
            }
            position += u64::from(extent.bytes);
        }
        prop_assert_eq!(seen, all);
    }
}

#[test]
fn a_buffer_of_virtually_contiguous_pages_is_one_command() {
    let buffers = [span(0x1200, 0xe00), span(0x8000, 0x1000), span(0x5000, 0x200)];

    let extent = extent(&buffers, 0, limits(512, MAX_TRANSFER), 4096);

    assert_eq!(extent, Extent { bytes: 0x2000, direct: true, listed: false });
    let mut list = Vec::new();
    let prps = build(&buffers, 0, 0x2000, BIG_LIST, |_, entry| list.push(entry));
    assert_eq!((prps, list), ((0x1200, BIG_LIST.raw()), vec![0x8000, 0x5000]));
}

#[test]
fn two_pages_need_no_list() {
    let prps = build(&[span(0x1e00, 0x400)], 0, 0x400, BIG_LIST, |_, _| panic!("no list"));
    assert_eq!(prps, (0x1e00, 0x2000));
}

#[test]
fn a_gap_ends_the_extent_at_the_last_whole_block() {
    let buffers = [span(0x1000, 0x1300), span(0x8000, 0xd00)];
    assert_eq!(
        extent(&buffers, 0, limits(512, MAX_TRANSFER), 4096),
        Extent { bytes: 0x1200, direct: true, listed: false }
    );
    // PRPs cannot describe the block across the gap, nor what follows it.
    assert_eq!(
        extent(&buffers, 0x1200, limits(512, MAX_TRANSFER), 4096),
        Extent { bytes: 0xe00, direct: false, listed: false }
    );
}

#[test]
fn an_unaligned_start_is_bounced_up_to_the_limit() {
    let buffers = [span(0x1002, 0x4000)];
    assert_eq!(
        extent(&buffers, 0, limits(512, MAX_TRANSFER), 4096),
        Extent { bytes: 4096, direct: false, listed: false }
    );
    assert_eq!(extent(&buffers, 0, limits(512, 1024), 4096), Extent { bytes: 1024, direct: false, listed: false });
}

#[test]
fn the_longest_transfer_fits_one_list_page_at_the_worst_offset() {
    let buffer = [span(0x1ffc, u64::from(MAX_TRANSFER))];
    let mut list = Vec::new();

    let (prp1, prp2) = build(&buffer, 0, MAX_TRANSFER, BIG_LIST, |_, entry| list.push(entry));

    assert_eq!((prp1, prp2, list.len()), (0x1ffc, BIG_LIST.raw(), 512));
    assert_eq!(walk(prp1, prp2, &list, u64::from(MAX_TRANSFER)).map(|touched| touched == addresses(&buffer)), Ok(true));
}

#[test]
fn the_last_page_of_the_address_space_can_be_described() {
    let buffers = [span(0x1000, 0x1000), span(u64::MAX - 0xfff, 0x1000)];
    assert_eq!(
        extent(&buffers, 0, limits(4096, MAX_TRANSFER), 4096),
        Extent { bytes: 0x2000, direct: true, listed: false }
    );
    let prps = build(&buffers, 0, 0x2000, BIG_LIST, |_, _| panic!("no list"));
    assert_eq!(prps, (0x1000, u64::MAX - 0xfff));
}
