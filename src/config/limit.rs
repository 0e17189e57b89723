//! How much the cache may hold.

use std::fmt;
use std::str::FromStr;

use indicatif::DecimalBytes;

/// How much may be stored before what was not used for longest is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheLimit {
    /// So many bytes of blobs and manifests.
    Bytes(u64),
    /// So many percent, 1 to 100, of what others leave of the disk that holds the storage: of what
    /// is cached and what is free.
    Share(u8),
}

/// Units of bytes, by their names in lower case.
const UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("b", 1),
    ("kb", 1000),
    ("mb", 1000 * 1000),
    ("gb", 1000 * 1000 * 1000),
    ("tb", 1000 * 1000 * 1000 * 1000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
];

impl CacheLimit {
    /// What holds where nothing is said.
    pub const DEFAULT: Self = Self::Share(80);
}

/// A text that is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotALimit;

impl FromStr for CacheLimit {
    type Err = NotALimit;

    fn from_str(text: &str) -> Result<Self, NotALimit> {
        let end = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let number: u64 = number.parse().map_err(|_| NotALimit)?;
        let unit = unit.trim_start().to_ascii_lowercase();
        if unit == "%" {
            let percent = u8::try_from(number).map_err(|_| NotALimit)?;
            return match percent {
                1..=100 => Ok(Self::Share(percent)),
                _ => Err(NotALimit),
            };
        }
        let size = UNITS.iter().find(|(name, _)| *name == unit);
        let bytes = size.and_then(|(_, size)| number.checked_mul(*size));
        // Nothing could be kept in nothing.
        bytes
            .filter(|bytes| *bytes > 0)
            .map(Self::Bytes)
            .ok_or(NotALimit)
    }
}

impl fmt::Display for CacheLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "{}", DecimalBytes(*bytes)),
            Self::Share(percent) => write!(f, "{percent}% of what others leave of the disk"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_with_their_units_and_shares_are_limits() {
        for (text, limit) in [
            ("500GB", Ok(CacheLimit::Bytes(500_000_000_000))),
            ("20GiB", Ok(CacheLimit::Bytes(20 << 30))),
            ("20 gib", Ok(CacheLimit::Bytes(20 << 30))),
            ("1000000", Ok(CacheLimit::Bytes(1_000_000))),
            ("80%", Ok(CacheLimit::Share(80))),
            ("100 %", Ok(CacheLimit::Share(100))),
            ("0%", Err(NotALimit)),
            ("101%", Err(NotALimit)),
            ("0", Err(NotALimit)),
            ("1.5GB", Err(NotALimit)),
            ("-1GB", Err(NotALimit)),
            ("GB", Err(NotALimit)),
            ("5 apples", Err(NotALimit)),
            ("20000000TB", Err(NotALimit)),
            ("", Err(NotALimit)),
        ] {
            assert_eq!(text.parse(), limit, "{text}");
        }
    }
}
