//! Hash tables for pretokens and pairs: open addressing, linear probing, power-of-two sizes.

/// A pretoken of 1 to 15 bytes in a register pair: its bytes, zeros, and its length in the topmost byte.
/// Nine in ten pretokens of prose fit, so nearly every lookup is two integer comparisons.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ShortKey {
    pub low: u64,
    pub high: u64,
}

impl ShortKey {
    pub(crate) const MAX_BYTES: usize = 15;

    /// Stands for a longer pretoken; differs from every key and from an empty slot.
    pub(crate) const LONG: ShortKey = ShortKey { low: u64::MAX, high: u64::MAX };

    /// Packs `text[at..at + length]`.
    #[inline(always)]
    pub fn pack(text: &[u8], at: usize, length: usize) -> ShortKey {
        debug_assert!((1..=Self::MAX_BYTES).contains(&length));
        let bytes: [u8; 16] = match text.get(at..at + 16) {
            Some(bytes) => bytes.try_into().expect("sixteen bytes"),
            None => {
                let mut bytes = [0; 16];
                bytes[..length].copy_from_slice(&text[at..at + length]);
                bytes
            }
        };
        let packed = u128::from_le_bytes(bytes) & (u128::MAX >> (128 - 8 * length)) | (length as u128) << 120;
        ShortKey { low: packed as u64, high: (packed >> 64) as u64 }
    }

    /// The bytes that were packed.
    pub fn bytes(self) -> ([u8; 16], usize) {
        let packed = u128::from(self.low) | u128::from(self.high) << 64;
        (packed.to_le_bytes(), (self.high >> 56) as usize)
    }

    #[inline(always)]
    pub fn hash(self) -> u64 {
        fold(self.low ^ 0x9E37_79B9_7F4A_7C15, self.high ^ 0xC2B2_AE3D_27D4_EB4F)
    }
}

/// Both halves of a 64 x 64 bit product, mixed: one multiplication stirs all input bits into all output bits.
#[inline(always)]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

/// Pretokens that are looked up together. Their cache lines are asked for while the text is still being cut, because
/// the tables outgrow the second-level cache and half of the time went into waiting for one line after the other.
pub(crate) const LOOKAHEAD: usize = 32;

/// A pretoken on its way to a table: `text[start..end]`. Its key is LONG if it has none.
#[derive(Clone, Copy, Default)]
pub struct Piece {
    pub start: usize,
    pub end: usize,
    pub key: ShortKey,
    pub hash: u64,
}

impl Piece {
    #[inline(always)]
    pub fn new(text: &[u8], start: usize, end: usize) -> Piece {
        if end - start > ShortKey::MAX_BYTES {
            return Piece { start, end, key: ShortKey::LONG, hash: 0 };
        }
        let key = ShortKey::pack(text, start, end - start);
        Piece { start, end, key, hash: key.hash() }
    }
}

/// Asks for the cache line of `entry` without waiting for it. Does nothing on processors that Rust has no stable way to
/// ask.
#[inline(always)]
pub fn prefetch<T>(entry: &T) {
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch((entry as *const T).cast(), _MM_HINT_T0);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = entry;
}

/// Byte strings of any length -> u64.
#[derive(Default)]
pub struct ByteMap {
    slots: Vec<u32>, // 1 + entry number; 0 is empty
    entries: Vec<ByteEntry>,
    arena: Vec<u8>,
}

struct ByteEntry {
    start: usize,
    length: usize,
    hash: u64,
    value: u64,
}

impl ByteMap {
    pub fn get(&self, key: &[u8]) -> Option<u64> {
        if self.slots.is_empty() {
            return None;
        }
        let found = self.find(key, hash_bytes(key)).ok()?;
        Some(self.entries[found].value)
    }

    /// The value of `key`, 0 if it is new.
    pub fn entry(&mut self, key: &[u8]) -> &mut u64 {
        if 2 * (self.entries.len() + 1) > self.slots.len() {
            self.grow();
        }
        let hash = hash_bytes(key);
        let number = match self.find(key, hash) {
            Ok(number) => number,
            Err(slot) => {
                let start = self.arena.len();
                self.arena.extend_from_slice(key);
                self.entries.push(ByteEntry { start, length: key.len(), hash, value: 0 });
                self.slots[slot] = u32::try_from(self.entries.len()).expect("fewer than 2^32 distinct long pretokens");
                self.entries.len() - 1
            }
        };
        &mut self.entries[number].value
    }

    pub fn iter(&self) -> impl Iterator<Item = (&[u8], u64)> {
        self.entries.iter().map(|entry| (self.key(entry), entry.value))
    }

    fn key(&self, entry: &ByteEntry) -> &[u8] {
        &self.arena[entry.start..entry.start + entry.length]
    }

    /// The entry's number, or the empty slot where it belongs.
    fn find(&self, key: &[u8], hash: u64) -> Result<usize, usize> {
        let mask = self.slots.len() - 1;
        let mut slot = hash as usize & mask;
        loop {
            match self.slots[slot] {
                0 => return Err(slot),
                number => {
                    let entry = &self.entries[number as usize - 1];
                    if entry.hash == hash && self.key(entry) == key {
                        return Ok(number as usize - 1);
                    }
                }
            }
            slot = (slot + 1) & mask;
        }
    }

    fn grow(&mut self) {
        let size = (2 * self.slots.len()).max(64);
        self.slots = vec![0; size];
        for (number, entry) in self.entries.iter().enumerate() {
            let mut slot = entry.hash as usize & (size - 1);
            while self.slots[slot] != 0 {
                slot = (slot + 1) & (size - 1);
            }
            self.slots[slot] = number as u32 + 1;
        }
    }
}

fn hash_bytes(bytes: &[u8]) -> u64 {
    let mut hash = bytes.len() as u64 ^ 0x9E37_79B9_7F4A_7C15;
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        hash = fold(hash ^ u64::from_le_bytes(word), 0xC2B2_AE3D_27D4_EB4F);
    }
    hash
}

/// Pairs of token ids as one integer that sorts like the pair.
pub fn pair_key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// A value that a `PairMap` can hold in a slot together with its key.
pub trait PairSlot: Copy {
    const EMPTY: Self;
    fn key(&self) -> u64;
}

/// Pairs -> slots that carry their own key; u64::MAX is no pair.
pub struct PairMap<S> {
    slots: Vec<S>,
    used: usize,
    shift: u32,
}

impl<S: PairSlot> PairMap<S> {
    pub fn with_capacity(pairs: usize) -> Self {
        let size = (2 * pairs).next_power_of_two().max(64);
        PairMap { slots: vec![S::EMPTY; size], used: 0, shift: 64 - size.trailing_zeros() }
    }

    /// The slot of `key`, or the empty one where it belongs. Fibonacci hashing: the product's top bits are the well
    /// mixed ones.
    #[inline(always)]
    fn find(&self, key: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut slot = (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> self.shift) as usize;
        while self.slots[slot].key() != key && self.slots[slot].key() != u64::MAX {
            slot = (slot + 1) & mask;
        }
        slot
    }

    #[inline(always)]
    pub fn get(&self, key: u64) -> Option<&S> {
        let slot = &self.slots[self.find(key)];
        (slot.key() == key).then_some(slot)
    }

    pub fn get_mut(&mut self, key: u64) -> Option<&mut S> {
        let place = self.find(key);
        let slot = &mut self.slots[place];
        (slot.key() == key).then_some(slot)
    }

    /// Adds a pair that is not there yet. At most 3/4 full.
    pub fn insert(&mut self, value: S) {
        if 4 * (self.used + 1) > 3 * self.slots.len() {
            let bigger = vec![S::EMPTY; 2 * self.slots.len()];
            let old = std::mem::replace(&mut self.slots, bigger);
            self.shift -= 1;
            for slot in old.into_iter().filter(|slot| slot.key() != u64::MAX) {
                let place = self.find(slot.key());
                self.slots[place] = slot;
            }
        }
        let place = self.find(value.key());
        self.slots[place] = value;
        self.used += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_keys_keep_bytes_and_length() {
        let text = b"abc\0\0defghijklmnopqrstuvwxyz";
        for at in 0..text.len() {
            for length in 1..=15.min(text.len() - at) {
                let (bytes, found) = ShortKey::pack(text, at, length).bytes();
                assert_eq!(bytes[..found], text[at..at + length]);
            }
        }
        assert_ne!(ShortKey::pack(b"a\0", 0, 1), ShortKey::pack(b"a\0", 0, 2));
    }

    #[test]
    fn byte_map_tells_long_strings_apart() {
        let mut map = ByteMap::default();
        for round in 1..=3 {
            for n in 0..1000u32 {
                *map.entry(format!("a rather long pretoken, number {n}").as_bytes()) += u64::from(n);
            }
            assert_eq!(map.get(b"a rather long pretoken, number 999"), Some(999 * round));
        }
        assert_eq!((map.iter().count(), map.get(b"a rather long pretoken, number 1000")), (1000, None));
    }
}
