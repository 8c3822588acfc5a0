//! What a server is configured with, in this crate's own units; `sluice_server.transport.options` says what each means.

use std::time::Duration;

use pyo3::prelude::*;

use crate::tls::TlsFiles;

/// The fields of Python's `TransportOptions`, read by name, and the two that only this transport has.
#[derive(Clone, Debug)]
pub struct Options {
    pub address: String,
    pub reuse_port: bool,
    pub unix_mode: Option<u32>,
    pub tls: Option<TlsFiles>,
    pub keepalive_time: Duration,
    pub keepalive_timeout: Duration,
    pub keepalive_permit_without_calls: bool,
    pub max_pings_without_data: u32,
    pub min_ping_interval: Duration,
    pub max_ping_strikes: u32,
    pub max_connection_age: Option<Duration>,
    pub max_connection_age_grace: Option<Duration>,
    pub max_concurrent_streams: u32,
    pub max_message_bytes: usize,
    pub max_header_bytes: u32,
    pub compression_level: u32,
    pub handshake_timeout: Duration,
    pub stall_timeout: Duration,
    pub max_connections: usize,
    pub max_held_bytes: usize,
    pub stream_ahead: usize,
}

impl Options {
    /// Reads Python's `TransportOptions`.
    pub fn read(options: &Bound<'_, PyAny>, max_held_bytes: usize, stream_ahead: usize) -> PyResult<Self> {
        let tls = options.getattr("tls")?;
        let compression = options.getattr("compression")?;
        Ok(Self {
            address: options.getattr("address")?.extract()?,
            reuse_port: options.getattr("reuse_port")?.extract()?,
            unix_mode: options.getattr("unix_mode")?.extract()?,
            tls: if tls.is_none() { None } else { Some(read_tls(&tls)?) },
            keepalive_time: seconds(options, "keepalive_time_s")?,
            keepalive_timeout: seconds(options, "keepalive_timeout_s")?,
            keepalive_permit_without_calls: options.getattr("keepalive_permit_without_calls")?.extract()?,
            max_pings_without_data: options.getattr("http2_max_pings_without_data")?.extract()?,
            min_ping_interval: seconds(options, "http2_min_recv_ping_interval_without_data_s")?,
            max_ping_strikes: options.getattr("http2_max_ping_strikes")?.extract()?,
            max_connection_age: maybe_seconds(options, "max_connection_age_s")?,
            max_connection_age_grace: maybe_seconds(options, "max_connection_age_grace_s")?,
            max_concurrent_streams: options.getattr("max_concurrent_streams")?.extract()?,
            max_message_bytes: options.getattr("max_message_bytes")?.extract()?,
            max_header_bytes: options.getattr("max_header_bytes")?.extract()?,
            compression_level: compression.getattr("zlib_level")?.extract()?,
            handshake_timeout: seconds(options, "handshake_timeout_s")?,
            stall_timeout: seconds(options, "stall_timeout_s")?,
            max_connections: options.getattr("max_connections")?.extract()?,
            max_held_bytes,
            stream_ahead,
        })
    }
}

fn read_tls(tls: &Bound<'_, PyAny>) -> PyResult<TlsFiles> {
    Ok(TlsFiles {
        certificate: tls.getattr("certificate")?.extract()?,
        key: tls.getattr("key")?.extract()?,
        client_roots: tls.getattr("client_roots")?.extract()?,
    })
}

/// The longest time that is not for ever: some thirty years, which every clock here can add.
const FOREVER: Duration = Duration::from_secs(1 << 30);

fn seconds(options: &Bound<'_, PyAny>, name: &str) -> PyResult<Duration> {
    Ok(maybe_seconds(options, name)?.unwrap_or(FOREVER))
}

fn maybe_seconds(options: &Bound<'_, PyAny>, name: &str) -> PyResult<Option<Duration>> {
    let value: Option<f64> = options.getattr(name)?.extract()?;
    Ok(value.map(|value| Duration::try_from_secs_f64(value).unwrap_or(FOREVER).min(FOREVER)))
}
