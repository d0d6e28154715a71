//! Cuts text into pretokens, the pieces inside which byte pairs may merge, exactly as published regexes do.
//!
//! A regex engine is not needed: each pattern is an ordered choice over four character classes (`\p{L}`, `\p{N}`, `\s`,
//! the rest) with at most one character of look-ahead, so the first character and the class of the second decide which
//! alternative matches. No match looks behind, hence scanning may restart at any pretoken boundary.

use crate::unicode::{LETTERS, NUMBERS, SPACES};
use std::sync::OnceLock;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pattern {
    Nanochat,
    Rustbpe,
    Gpt4,
    Gpt2,
    Whole,
}

impl Pattern {
    pub fn by_name(name: &str) -> Option<Pattern> {
        match name {
            "nanochat" => Some(Pattern::Nanochat),
            "rustbpe" => Some(Pattern::Rustbpe),
            "gpt4" => Some(Pattern::Gpt4),
            "gpt2" => Some(Pattern::Gpt2),
            "whole" => Some(Pattern::Whole),
            _ => None,
        }
    }
}

/// What the patterns differ in. A type per pattern, so that every test on these constants is decided by the compiler.
pub trait Rules {
    /// Contractions in any case, any one character before letters, newlines kept together: GPT-4's form.
    /// Otherwise GPT-2's: only a space may lead letters, numbers or symbols, and newlines are plain white space.
    const MODERN: bool;
    /// Numbers are cut into groups of this many.
    const MAX_DIGITS: usize;
    /// White space up to the end of the text is one piece even where it holds newlines (`\s++$` comes first).
    const TRAILING_RUN_WHOLE: bool;
    /// The text is one pretoken: somebody else has split it.
    const WHOLE: bool = false;
}

/// `'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+`
pub struct Nanochat;

impl Rules for Nanochat {
    const MODERN: bool = true;
    const MAX_DIGITS: usize = 2;
    const TRAILING_RUN_WHOLE: bool = false;
}

/// As `Nanochat` with `\p{N}{1,3}`: what the published package rustbpe splits by unless told otherwise.
pub struct Rustbpe;

impl Rules for Rustbpe {
    const MODERN: bool = true;
    const MAX_DIGITS: usize = 3;
    const TRAILING_RUN_WHOLE: bool = false;
}

/// `'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|
/// ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s`
pub struct Gpt4;

impl Rules for Gpt4 {
    const MODERN: bool = true;
    const MAX_DIGITS: usize = 3;
    const TRAILING_RUN_WHOLE: bool = true;
}

/// `'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s`
pub struct Gpt2;

impl Rules for Gpt2 {
    const MODERN: bool = false;
    const MAX_DIGITS: usize = usize::MAX;
    const TRAILING_RUN_WHOLE: bool = true;
}

/// `[\s\S]+`
pub struct Whole;

impl Rules for Whole {
    const MODERN: bool = true;
    const MAX_DIGITS: usize = 1;
    const TRAILING_RUN_WHOLE: bool = true;
    const WHOLE: bool = true;
}

const LETTER: u8 = 0;
const NUMBER: u8 = 1;
const SPACE: u8 = 2; // \s except the two below
const NEWLINE: u8 = 3; // \r and \n
const OTHER: u8 = 4;
const WIDE: u8 = 5; // first byte of a character beyond ASCII: ask the table

const BYTE_CLASS: [u8; 256] = byte_classes();

const fn byte_classes() -> [u8; 256] {
    let mut table = [OTHER; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => LETTER,
            b'0'..=b'9' => NUMBER,
            b'\n' | b'\r' => NEWLINE,
            b' ' | b'\t' | 0x0B | 0x0C => SPACE,
            0..=0x7F => OTHER,
            _ => WIDE,
        };
        byte += 1;
    }
    table
}

/// Classes of all code points: 4,352 pages of 256, of which the distinct ones (about 150) are stored.
struct Classes {
    page_of: Vec<u8>,
    pages: Vec<[u8; 256]>,
}

impl Classes {
    fn get(code: u32) -> u8 {
        static CLASSES: OnceLock<Classes> = OnceLock::new();
        let classes = CLASSES.get_or_init(Classes::build);
        classes.pages[classes.page_of[code as usize >> 8] as usize][code as usize & 255]
    }

    fn build() -> Classes {
        let mut flat = vec![OTHER; 0x11_0000];
        for (ranges, class) in [(&LETTERS[..], LETTER), (&NUMBERS[..], NUMBER), (&SPACES[..], SPACE)] {
            for &(low, high) in ranges {
                flat[low as usize..=high as usize].fill(class);
            }
        }
        let (mut page_of, mut pages) = (Vec::new(), Vec::<[u8; 256]>::new());
        for page in flat.chunks_exact(256) {
            let known = pages.iter().position(|other| other[..] == *page);
            let number = known.unwrap_or_else(|| {
                pages.push(page.try_into().expect("chunks have 256 entries"));
                pages.len() - 1
            });
            page_of.push(u8::try_from(number).expect("fewer than 256 distinct pages"));
        }
        Classes { page_of, pages }
    }
}

/// Class and width in bytes of the character at `at`.
#[inline(always)]
fn class_at(text: &[u8], at: usize) -> (u8, usize) {
    match BYTE_CLASS[text[at] as usize] {
        WIDE => wide_class_at(text, at),
        class => (class, 1),
    }
}

#[inline(never)]
fn wide_class_at(text: &[u8], at: usize) -> (u8, usize) {
    let tail = |n: usize| u32::from(text[at + n] & 0x3F);
    let first = u32::from(text[at]);
    let (code, width) = match first {
        0..=0xDF => ((first & 0x1F) << 6 | tail(1), 2),
        0xE0..=0xEF => ((first & 0x0F) << 12 | tail(1) << 6 | tail(2), 3),
        _ => ((first & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4),
    };
    (Classes::get(code), width)
}

/// End of the pretoken that begins at `at`. `text` is UTF-8, `at` a character boundary before its end.
#[inline(always)]
pub fn next<R: Rules>(text: &[u8], at: usize) -> usize {
    if R::WHOLE {
        return text.len();
    }
    let (class, width) = class_at(text, at);
    let after = at + width;
    match class {
        LETTER => letters_end(text, after),
        SPACE | NEWLINE => after_space::<R>(text, at, class, after),
        NUMBER => numbers_end::<R>(text, after),
        _ => after_symbol::<R>(text, at, after),
    }
}

#[inline(always)]
fn after_space<R: Rules>(text: &[u8], at: usize, class: u8, after: usize) -> usize {
    if after == text.len() {
        return after;
    }
    let (second, width) = class_at(text, after);
    let blank = text[at] == b' ';
    match second {
        SPACE | NEWLINE => spaces_end::<R>(text, at),
        LETTER if blank || (R::MODERN && class == SPACE) => letters_end(text, after + width),
        OTHER if blank => symbols_end::<R>(text, after + width),
        NUMBER if blank && !R::MODERN => numbers_end::<R>(text, after + width),
        _ => after,
    }
}

#[inline(always)]
fn after_symbol<R: Rules>(text: &[u8], at: usize, after: usize) -> usize {
    if text[at] == b'\'' {
        if let Some(end) = contraction_end::<R>(text, after) {
            return end;
        }
    }
    if R::MODERN && after < text.len() {
        let (second, width) = class_at(text, after);
        if second == LETTER {
            return letters_end(text, after + width);
        }
    }
    symbols_end::<R>(text, after)
}

/// End of `s d m t ll ve re` at `at`. In any case also means U+017F, which folds to s.
fn contraction_end<R: Rules>(text: &[u8], at: usize) -> Option<usize> {
    let fold = if R::MODERN { 0x20 } else { 0 }; // sets the bit that tells lower case from upper
    let first = *text.get(at)?;
    if let b's' | b'd' | b'm' | b't' = first | fold {
        return Some(at + 1);
    }
    let second = *text.get(at + 1)?;
    match (first | fold, second | fold) {
        (b'l', b'l') | (b'v', b'e') | (b'r', b'e') => Some(at + 2),
        _ if R::MODERN && (first, second) == (0xC5, 0xBF) => Some(at + 2),
        _ => None,
    }
}

/// Marks (in the top bit of each byte) the bytes of `word` that are no ASCII letters.
#[inline(always)]
fn non_letters(word: u64) -> u64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const TOPS: u64 = ONES * 0x80;
    let lower = (word | (ONES * 0x20)) & !TOPS;
    let from_a = lower + ONES * (0x80 - b'a' as u64); // top bit set: at least 'a'
    let past_z = lower + ONES * (0x7F - b'z' as u64); // top bit set: beyond 'z'
    (!from_a | past_z | word) & TOPS
}

#[inline(always)]
fn letters_end(text: &[u8], mut at: usize) -> usize {
    loop {
        while let Some(bytes) = text.get(at..at + 8) {
            let stops = non_letters(u64::from_le_bytes(bytes.try_into().expect("eight bytes")));
            if stops != 0 {
                at += stops.trailing_zeros() as usize / 8;
                break;
            }
            at += 8;
        }
        while at < text.len() && BYTE_CLASS[text[at] as usize] == LETTER {
            at += 1;
        }
        if at == text.len() || text[at] < 0x80 {
            return at;
        }
        let (class, width) = wide_class_at(text, at);
        if class != LETTER {
            return at;
        }
        at += width;
    }
}

#[inline(always)]
fn run_end(text: &[u8], mut at: usize, most: usize, wanted: u8) -> usize {
    let mut taken = 0;
    while at < text.len() && taken < most {
        let (class, width) = class_at(text, at);
        if class != wanted {
            break;
        }
        at += width;
        taken += 1;
    }
    at
}

/// One number has been taken; take the rest of its group.
#[inline(always)]
fn numbers_end<R: Rules>(text: &[u8], at: usize) -> usize {
    run_end(text, at, R::MAX_DIGITS - 1, NUMBER)
}

#[inline(always)]
fn symbols_end<R: Rules>(text: &[u8], at: usize) -> usize {
    let end = run_end(text, at, usize::MAX, OTHER);
    if R::MODERN {
        run_end(text, end, usize::MAX, NEWLINE)
    } else {
        end
    }
}

/// At least two white space characters start at `at`: up to the last newline among them, else all at the end of the
/// text, else all but the last, which belongs to what follows.
fn spaces_end<R: Rules>(text: &[u8], at: usize) -> usize {
    let (mut end, mut last, mut newline_end) = (at, at, at);
    while end < text.len() {
        let (class, width) = class_at(text, end);
        if class != SPACE && class != NEWLINE {
            break;
        }
        last = end;
        end += width;
        if class == NEWLINE {
            newline_end = end;
        }
    }
    if end == text.len() && R::TRAILING_RUN_WHOLE {
        end
    } else if R::MODERN && newline_end > at {
        newline_end
    } else if end == text.len() {
        end
    } else {
        last
    }
}

/// Runs `$body` with `$rules` naming the type of `$pattern`.
#[macro_export]
macro_rules! with_rules {
    ($pattern:expr, $rules:ident => $body:expr) => {
        match $pattern {
            $crate::scanner::Pattern::Nanochat => {
                type $rules = $crate::scanner::Nanochat;
                $body
            }
            $crate::scanner::Pattern::Rustbpe => {
                type $rules = $crate::scanner::Rustbpe;
                $body
            }
            $crate::scanner::Pattern::Gpt4 => {
                type $rules = $crate::scanner::Gpt4;
                $body
            }
            $crate::scanner::Pattern::Gpt2 => {
                type $rules = $crate::scanner::Gpt2;
                $body
            }
            $crate::scanner::Pattern::Whole => {
                type $rules = $crate::scanner::Whole;
                $body
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The patterns once more, read off the regexes alternative by alternative over a list of characters.
    fn slow_next(pattern: Pattern, text: &[char], at: usize) -> usize {
        let class = |i: usize| text.get(i).map(|&c| slow_class(c));
        let run = |from: usize, most: usize, wanted: &[u8]| {
            let mut end = from;
            while end < text.len() && end - from < most && wanted.contains(&slow_class(text[end])) {
                end += 1;
            }
            end
        };
        let modern = pattern != Pattern::Gpt2;
        let white = [SPACE, NEWLINE];
        if text[at] == '\'' {
            for word in ["s", "d", "m", "t", "\u{17F}", "ll", "ve", "re"] {
                let end = (at + 1 + word.chars().count()).min(text.len());
                let found: String = text[at + 1..end].iter().collect();
                if found == word && (modern || word != "\u{17F}") || modern && found.to_ascii_lowercase() == word {
                    return end;
                }
            }
        }
        let led = match (modern, class(at)) {
            (true, Some(SPACE | OTHER)) => at + 1,
            (false, _) if text[at] == ' ' => at + 1,
            _ => at,
        };
        if class(led) == Some(LETTER) {
            return run(led, usize::MAX, &[LETTER]);
        }
        let (lead, group) = match pattern {
            Pattern::Nanochat => (at, 2),
            Pattern::Gpt2 => (led, usize::MAX),
            _ => (at, 3),
        };
        if class(lead) == Some(NUMBER) {
            return run(lead, group, &[NUMBER]);
        }
        let lead = at + usize::from(text[at] == ' ');
        if class(lead) == Some(OTHER) {
            let end = run(lead, usize::MAX, &[OTHER]);
            return if modern { run(end, usize::MAX, &[NEWLINE]) } else { end };
        }
        let end = run(at, usize::MAX, &white);
        let newline = (at..end).rev().find(|&i| slow_class(text[i]) == NEWLINE);
        match (pattern, newline) {
            (Pattern::Nanochat | Pattern::Rustbpe, Some(i)) => i + 1,
            (Pattern::Gpt4, Some(i)) if end < text.len() => i + 1,
            _ if end < text.len() && end - at > 1 => end - 1,
            _ => end,
        }
    }

    fn slow_class(c: char) -> u8 {
        let within = |ranges: &[(u32, u32)]| ranges.iter().any(|&(low, high)| (low..=high).contains(&(c as u32)));
        match c {
            '\r' | '\n' => NEWLINE,
            _ if within(&LETTERS) => LETTER,
            _ if within(&NUMBERS) => NUMBER,
            _ if within(&SPACES) => SPACE,
            _ => OTHER,
        }
    }

    fn pieces(pattern: Pattern, text: &str) -> Vec<&str> {
        let (mut found, mut at) = (Vec::new(), 0);
        while at < text.len() {
            let end = with_rules!(pattern, R => next::<R>(text.as_bytes(), at));
            found.push(&text[at..end]);
            at = end;
        }
        found
    }

    #[test]
    fn known_splits() {
        let text = "I'll pay $1234, it's\n\n  OK \t\n ";
        let nanochat = ["I", "'ll", " pay", " $", "12", "34", ",", " it", "'s", "\n\n", " ", " OK", " \t\n", " "];
        let rustbpe = ["I", "'ll", " pay", " $", "123", "4", ",", " it", "'s", "\n\n", " ", " OK", " \t\n", " "];
        let gpt4 = ["I", "'ll", " pay", " $", "123", "4", ",", " it", "'s", "\n\n", " ", " OK", " \t\n "];
        let gpt2 = ["I", "'ll", " pay", " $", "1234", ",", " it", "'s", "\n\n ", " OK", " \t\n "];
        assert_eq!(pieces(Pattern::Nanochat, text), nanochat);
        assert_eq!(pieces(Pattern::Rustbpe, text), rustbpe);
        assert_eq!(pieces(Pattern::Gpt4, text), gpt4);
        assert_eq!(pieces(Pattern::Gpt2, text), gpt2);
        assert_eq!(pieces(Pattern::Whole, text), [text]);
    }

    #[test]
    fn agrees_with_the_alternatives_read_one_by_one() {
        let alphabet: Vec<char> =
            "aZsSlLvVeErRtTdm09  \t\r\n''!.\u{17F}\u{A0}\u{85}\u{301}éЖ中①\u{3000}🙂\u{2019}".chars().collect();
        let mut state = 7u64;
        let mut random = move |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        for _ in 0..30_000 {
            let chars: Vec<char> = (0..1 + random(24)).map(|_| alphabet[random(alphabet.len())]).collect();
            let text: String = chars.iter().collect();
            for pattern in [Pattern::Nanochat, Pattern::Rustbpe, Pattern::Gpt4, Pattern::Gpt2] {
                let (mut slow, mut at) = (Vec::new(), 0);
                while at < chars.len() {
                    let end = slow_next(pattern, &chars, at);
                    slow.push(chars[at..end].iter().collect::<String>());
                    at = end;
                }
                assert_eq!(pieces(pattern, &text), slow, "{pattern:?} {text:?}");
            }
        }
    }

    #[test]
    fn eight_letters_at_once() {
        for byte in 0..=255u8 {
            for place in 0..8 {
                let mut bytes = *b"azAZmMqQ";
                bytes[place] = byte;
                let expected = if byte.is_ascii_alphabetic() { 0 } else { 0x80 << (8 * place) };
                assert_eq!(non_letters(u64::from_le_bytes(bytes)), expected, "{byte} at {place}");
            }
        }
    }
}
