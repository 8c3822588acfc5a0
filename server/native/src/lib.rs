//! The native transport of Sluice: HTTP/2, gRPC framing, TLS and their limits, off Python's interpreter lock.
//!
//! Nothing here knows protobuf or models, or decides what a call is answered with. One thread owns every socket; Python
//! takes what has arrived in lists (`Server.take`) and answers from any thread. `shared` is where the two meet.
#![forbid(unsafe_code)]

mod answer;
mod authority;
mod buffered;
mod call;
mod compression;
mod connection;
mod framing;
mod headers;
mod listen;
mod meter;
mod options;
mod receive;
mod runtime;
mod server;
mod shared;
mod tls;
mod turns;
mod watching;

use pyo3::prelude::*;

/// The Python module: `Server`, and the `Call` and `Stream` that it hands up.
#[pymodule]
fn sluice_native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<server::Server>()?;
    module.add_class::<call::Call>()?;
    module.add_class::<call::Stream>()
}
