//! Byte-pair encoding for nanochat: trains vocabularies and encodes text. Only std: a compiler is enough to build it.
//!
//! This file is the border to Python: C functions that take addresses with lengths, run to the end on the caller's
//! thread (Python calls them without its lock, long ones from a worker thread) and share a `Call` with whoever waits: a
//! flag to stop them, a count of what is done, and room for a message. No panic crosses: it becomes status INTERNAL
//! with the panic's text.
//!
//! Promises: the merges of the naive algorithm with ties to the smallest pair; the ids of tiktoken with the same ranks;
//! the same answer for any number of threads. Does not: hold special tokens, normalise text, or accept text that is not
//! UTF-8.
//!
//! Tried and dropped (50 MB of web text, one busy Zen 5 core; encoding warm, at 8,192 and 32,768 tokens):
//! - Looking pretokens up one at a time: 173 and 153 MB/s against 220 and 215 with 32 in flight, counting 255 against
//!   320. 64 in flight make no difference that the noise lets through.
//! - A cache of four slots per token: at 8,192 tokens it has 1 MiB, evicts all the time and cost a fifth (117 against
//!   145 MB/s, before the look-ahead). Its size must follow the text's distinct pretokens, not the vocabulary.
//! - Fat link-time optimisation: 215 and 203 MB/s, so nothing, for a build that takes 23 s instead of 5.

// The contract of every function here is the one above; repeating it under a heading per function would hide the
// differences.
#![allow(clippy::missing_safety_doc)]

mod batch;
mod encode;
mod scanner;
mod table;
mod train;
mod unicode;

use batch::{Batch, Control, Failure, Offsets};
use encode::Encoder;
use scanner::Pattern;
use std::panic::{catch_unwind, set_hook, AssertUnwindSafe};
use std::ptr::addr_of_mut;
use std::slice;
use std::sync::atomic::AtomicU64;
use std::sync::Once;
use train::Trainer;

/// Below zero a call failed and `Call.message` says why; zero and above is its answer.
const INTERNAL: i64 = -1;
const INVALID: i64 = -2;
const STOPPED: i64 = -3;

/// Shared by a running call and the thread that watches it.
#[repr(C)]
pub struct Call {
    stop: u64,
    done: u64,
    message: [u8; 256],
}

/// A column of texts: row r is data[offsets[r]..offsets[r + 1]], offsets of 4 or 8 bytes. Messages count rows from
/// first_row.
#[repr(C)]
pub struct Texts {
    data: *const u8,
    data_bytes: u64,
    offsets: *const u8,
    offset_width: u64,
    rows: u64,
    first_row: u64,
}

impl Texts {
    unsafe fn batch(&self) -> Result<Batch<'_>, Failure> {
        let entries = self.rows as usize + 1;
        let offsets = match self.offset_width {
            4 => Offsets::Small(view(self.offsets.cast(), entries)),
            8 => Offsets::Large(view(self.offsets.cast(), entries)),
            width => return Err(Failure::Invalid(format!("offsets of {width} bytes; 4 and 8 are known"))),
        };
        Batch::new(view(self.data, self.data_bytes as usize), offsets, self.first_row as usize)
    }
}

/// A slice that may be empty without an address.
unsafe fn view<'a, T>(start: *const T, length: usize) -> &'a [T] {
    if length == 0 {
        &[]
    } else {
        slice::from_raw_parts(start, length)
    }
}

unsafe fn pattern(name: *const u8, bytes: u64) -> Result<Pattern, Failure> {
    let name = String::from_utf8_lossy(view(name, bytes as usize));
    Pattern::by_name(&name).ok_or_else(|| {
        Failure::Invalid(format!("unknown split pattern {name:?}; known: nanochat, rustbpe, gpt4, gpt2, whole"))
    })
}

/// Runs `body` and turns failures and panics into a status and a message.
unsafe fn guard(call: *mut Call, body: impl FnOnce(&Control) -> Result<i64, Failure>) -> i64 {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| set_hook(Box::new(|_| {}))); // the text goes to the caller, not to standard error
    let stop = AtomicU64::from_ptr(addr_of_mut!((*call).stop));
    let done = AtomicU64::from_ptr(addr_of_mut!((*call).done));
    let control = Control { stop, done };
    let (status, text) = match catch_unwind(AssertUnwindSafe(|| body(&control))) {
        Ok(Ok(answer)) => return answer,
        Ok(Err(Failure::Stopped)) => (STOPPED, "stopped".to_string()),
        Ok(Err(Failure::Invalid(text))) => (INVALID, text),
        Err(panic) => {
            let known = panic.downcast_ref::<&str>().map(|text| text.to_string());
            let text = known.or_else(|| panic.downcast_ref::<String>().cloned());
            (INTERNAL, text.unwrap_or_else(|| "unknown panic".into()))
        }
    };
    let message = &mut (*call).message;
    let length = text.len().min(message.len() - 1);
    message[..length].copy_from_slice(&text.as_bytes()[..length]);
    message[length] = 0;
    status
}

/// Starts counting; the trainer is put into `trainer`.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_trainer_new(
    name: *const u8,
    name_bytes: u64,
    threads: u64,
    trainer: *mut *mut Trainer,
    call: *mut Call,
) -> i64 {
    guard(call, |_| {
        *trainer = Box::into_raw(Box::new(Trainer::new(pattern(name, name_bytes)?, threads as usize)));
        Ok(0)
    })
}

#[no_mangle]
pub unsafe extern "C" fn rustbpe_trainer_free(trainer: *mut Trainer) {
    drop(Box::from_raw(trainer));
}

/// Counts the pretokens of `texts`. One call at a time per trainer. done: bytes.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_trainer_feed(trainer: *mut Trainer, texts: *const Texts, call: *mut Call) -> i64 {
    guard(call, |control| {
        (*trainer).feed(&(*texts).batch()?, control)?;
        Ok(0)
    })
}

/// Learns up to `most` merges, writes them as pairs to `merges` (2 x most places) and answers how many. Empties the
/// counts. done: merges.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_trainer_train(
    trainer: *mut Trainer,
    merges: *mut u32,
    most: u64,
    call: *mut Call,
) -> i64 {
    guard(call, |control| {
        let found = (*trainer).train(most as usize, control)?;
        for (number, (left, right)) in found.iter().enumerate() {
            *merges.add(2 * number) = *left;
            *merges.add(2 * number + 1) = *right;
        }
        Ok(found.len() as i64)
    })
}

/// Makes an encoder of a vocabulary: row r of `tokens` is the bytes of token r (here they need not be UTF-8).
#[no_mangle]
pub unsafe extern "C" fn rustbpe_encoder_new(
    name: *const u8,
    name_bytes: u64,
    tokens: *const Texts,
    encoder: *mut *mut Encoder,
    call: *mut Call,
) -> i64 {
    guard(call, |_| {
        let batch = (*tokens).batch()?;
        let data = view((*tokens).data, (*tokens).data_bytes as usize);
        let vocabulary: Vec<&[u8]> = (0..batch.rows()).map(|row| &data[batch.row(row)]).collect();
        *encoder = Box::into_raw(Box::new(Encoder::new(pattern(name, name_bytes)?, &vocabulary)?));
        Ok(0)
    })
}

#[no_mangle]
pub unsafe extern "C" fn rustbpe_encoder_free(encoder: *mut Encoder) {
    drop(Box::from_raw(encoder));
}

/// Ids that the output of `rustbpe_encode` must have room for.
#[no_mangle]
pub extern "C" fn rustbpe_room(bytes: u64, rows: u64) -> u64 {
    Encoder::room(bytes as usize, rows as usize) as u64
}

/// Writes the ids of all rows to `ids` (of 2 or 4 bytes, `room` places) and, for each row, where they end to `ends`;
/// answers how many ids there are. Any number of calls at a time per encoder. done: bytes.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_encode(
    encoder: *const Encoder,
    texts: *const Texts,
    threads: u64,
    ids: *mut u8,
    id_width: u64,
    room: u64,
    ends: *mut i64,
    call: *mut Call,
) -> i64 {
    guard(call, |control| {
        let (batch, threads, room) = ((*texts).batch()?, threads as usize, room as usize);
        let encoder = &*encoder;
        let encoded = match id_width {
            2 => encoder.encode(&batch, threads, slice::from_raw_parts_mut(ids.cast::<u16>(), room), control)?,
            4 => encoder.encode(&batch, threads, slice::from_raw_parts_mut(ids.cast::<u32>(), room), control)?,
            width => return Err(Failure::Invalid(format!("ids of {width} bytes; 2 and 4 are known"))),
        };
        let mut end = 0;
        for (row, ids) in encoded.row_ids.iter().enumerate() {
            end += *ids as i64;
            *ends.add(row) = end;
        }
        Ok(encoded.ids as i64)
    })
}

/// Writes where each pretoken of a UTF-8 text ends to `ends` (as many places as bytes) and answers how many there are.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_split(
    name: *const u8,
    name_bytes: u64,
    text: *const u8,
    text_bytes: u64,
    ends: *mut u64,
    call: *mut Call,
) -> i64 {
    guard(call, |_| {
        let text = view(text, text_bytes as usize);
        if std::str::from_utf8(text).is_err() {
            return Err(Failure::Invalid("the text is not valid UTF-8".into()));
        }
        let pattern = pattern(name, name_bytes)?;
        let (mut at, mut count) = (0, 0);
        while at < text.len() {
            at = with_rules!(pattern, R => scanner::next::<R>(text, at));
            *ends.add(count) = at as u64;
            count += 1;
        }
        Ok(count as i64)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_status_with_its_text() {
        let mut call = Call { stop: 0, done: 0, message: [b'x'; 256] };
        let status = unsafe { guard(&mut call, |_| panic!("{}", "long ".repeat(99))) };
        assert_eq!(status, INTERNAL);
        assert!(call.message.starts_with(b"long long ") && call.message[255] == 0);
    }

    #[test]
    fn a_missing_buffer_is_an_empty_text() {
        let offsets = [0i32; 2];
        let texts = Texts {
            data: std::ptr::null(),
            data_bytes: 0,
            offsets: offsets.as_ptr().cast(),
            offset_width: 4,
            rows: 1,
            first_row: 0,
        };
        assert_eq!(unsafe { texts.batch() }.unwrap().row(0), 0..0);
    }
}
