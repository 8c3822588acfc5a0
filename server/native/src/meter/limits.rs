//! What a client may do in a span of time before its connection is closed, and what that is called.

use std::time::Duration;

/// SETTINGS in ten seconds. Each goes over all open streams and is acknowledged before anything else is read. gRPC's
/// clients tell new windows as they measure the connection, ten times a second at most.
const MAX_SETTINGS: u64 = 500;

/// RST_STREAM in a second. Each stood for a stream that was opened, decoded and perhaps handed up for nothing, some
/// 20 us, and that did not count against the streams a client may have open (CVE-2023-44487). A client that gives up
/// every call after a millisecond makes some thousands a second on one connection, which must go on being served; an
/// attacker sends a hundred times as many. It is a fifth of the time of the thread that all connections share.
const MAX_RESETS: u64 = 10_000;

/// Frames without effect in a second: DATA and CONTINUATION without content, acknowledged PINGs, frames of types that
/// HTTP/2 ignores. Honest ones are singular, such as the answer to a keepalive ping.
const MAX_EMPTY_FRAMES: u64 = 10_000;

/// WINDOW_UPDATE in a second, besides what was earned: a few for each call that is opened and for the windows to grow.
const MAX_WINDOW_UPDATES: u64 = 100_000;

/// PRIORITY in a second: gRPC never sends it, browsers one or a few for each stream, and `h2` ignores it.
const MAX_PRIORITIES: u64 = 20_000;

/// What a client may do before its connection is closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pings that may come too early between two frames with HEADERS or DATA; 0: any number.
    pub max_ping_strikes: u32,
    /// A ping that follows the last one sooner is a strike.
    pub min_ping_interval: Duration,
    /// Whether `min_ping_interval` counts on a connection without calls too, and not two hours.
    pub permit_without_calls: bool,
    /// SETTINGS in ten seconds.
    pub settings: u64,
    /// RST_STREAM in a second.
    pub resets: u64,
    /// Frames without effect in a second.
    pub empty_frames: u64,
    /// WINDOW_UPDATE in a second, besides those that were earned by what was written.
    pub window_updates: u64,
    /// PRIORITY in a second.
    pub priorities: u64,
}

impl Default for Limits {
    /// gRPC's own policy of pings, and bounds that no honest client meets.
    fn default() -> Self {
        Self {
            max_ping_strikes: 2,
            min_ping_interval: Duration::from_secs(300),
            permit_without_calls: false,
            settings: MAX_SETTINGS,
            resets: MAX_RESETS,
            empty_frames: MAX_EMPTY_FRAMES,
            window_updates: MAX_WINDOW_UPDATES,
            priorities: MAX_PRIORITIES,
        }
    }
}

/// What a client sent too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flood {
    Pings,
    Settings,
    Resets,
    EmptyFrames,
    WindowUpdates,
    Priorities,
}

impl Flood {
    pub const ALL: [Self; 6] =
        [Self::Pings, Self::Settings, Self::Resets, Self::EmptyFrames, Self::WindowUpdates, Self::Priorities];

    /// The debug data of the GOAWAY; gRPC's clients know `too_many_pings`, and ping half as often from then on.
    pub fn text(self) -> &'static str {
        match self {
            Self::Pings => "too_many_pings",
            Self::Settings => "too_many_settings",
            Self::Resets => "too_many_resets",
            Self::EmptyFrames => "too_many_empty_frames",
            Self::WindowUpdates => "too_many_window_updates",
            Self::Priorities => "too_many_priorities",
        }
    }
}
