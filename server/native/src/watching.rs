//! Whether the transport's thread watches for the answer to a lone request instead of going to sleep: pure.
//!
//! A request that is alone in the server is answered in the time that two wake-ups of threads take, so that watching for its
//! answer spares one of them. What is watched for in vain costs a core for a moment and keeps others waiting: each time in
//! vain makes watching rarer, and one answer in time makes it the rule again.

use std::time::Duration;

/// What a small model and all around it take on a slow machine.
pub const WATCH_MAX: Duration = Duration::from_micros(150);

/// So many requests of a connection in a row are alone before the answer to one is watched for: the first of a burst is alone
/// too.
const ALONE_MIN: u32 = 4;

/// Each time in vain, in a row, doubles how many requests are not watched for, up to a thousand.
const IN_VAIN_MAX: u32 = 10;

/// What became of the last requests of a connection.
#[derive(Debug, Default)]
pub struct Watching {
    /// Requests in a row that were alone, up to `ALONE_MIN`.
    alone: u32,
    in_vain: u32,
    /// Requests that are not watched for.
    skipped: u32,
}

impl Watching {
    /// Whether to watch for the answer to what has come; `alone`: it is one request, and no other is in the server.
    pub fn is_due(&mut self, alone: bool) -> bool {
        self.alone = if alone { (self.alone + 1).min(ALONE_MIN) } else { 0 };
        if self.alone < ALONE_MIN {
            return false;
        }
        let due = self.skipped == 0;
        self.skipped = self.skipped.saturating_sub(1);
        due
    }

    /// Notes whether an answer that was watched for came in time.
    pub fn note(&mut self, came: bool) {
        self.in_vain = if came { 0 } else { (self.in_vain + 1).min(IN_VAIN_MAX) };
        self.skipped = (1 << self.in_vain) - 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection with as many requests behind it, each alone, that from now on answers are watched for.
    fn after_lone_ones() -> Watching {
        Watching { alone: ALONE_MIN - 1, ..Watching::default() }
    }

    /// For how many of so many requests, each alone, it is watched, when their answers come in time or not.
    fn watched(watching: &mut Watching, requests: usize, came: bool) -> usize {
        let mut count = 0;
        for _ in 0..requests {
            if watching.is_due(true) {
                watching.note(came);
                count += 1;
            }
        }
        count
    }

    #[test]
    fn answers_in_time_are_all_watched_for_and_late_ones_ever_more_rarely() {
        let mut watching = after_lone_ones();
        assert_eq!(watched(&mut watching, 1000, true), 1000);
        assert_eq!(watched(&mut watching, 1 + 2 + 4 + 8, false), 4);
        watched(&mut watching, 10_000, false);
        assert_eq!(watched(&mut watching, 10 * 1024, false), 10);
    }

    #[test]
    fn one_answer_in_time_makes_watching_the_rule_again() {
        let mut watching = after_lone_ones();
        watched(&mut watching, 100, false);
        while !watching.is_due(true) {}
        watching.note(true);
        assert_eq!(watched(&mut watching, 10, true), 10);
    }

    #[test]
    fn a_request_that_is_alone_among_others_is_not_watched_for() {
        let mut watching = after_lone_ones();
        for _ in 0..10 {
            assert!(watching.is_due(true));
            watching.note(true);
            assert!(!watching.is_due(false));
            assert_eq!(watched(&mut watching, ALONE_MIN as usize - 1, true), 0);
        }
    }
}
