//! NVM Express.
