//! TLS for the listener: certificate files into a rustls configuration, taken anew when they change on disk, and the
//! names in a client's certificate.
//!
//! An error's text says which file is wrong and why, as it goes to whoever started the server.

use std::fmt::Display;
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::crypto::ring::default_provider;
use rustls::crypto::ring::sign::any_supported_type;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use tokio_rustls::TlsAcceptor;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// How often the files are looked at, at most: a rotated certificate is in use a second later, and a thousand
/// connections a second cost one look.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Bytes that a PEM file may have: a thousand times a usual chain, and a bound on what a wrong path can make us read.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// What HTTP/2 over TLS is called in ALPN (RFC 9113, 3.2).
const HTTP2: &[u8] = b"h2";

/// How an encrypted key shows: PKCS#8's own section, and the header of the older forms.
const ENCRYPTED_MARKS: [&[u8]; 2] = [b"BEGIN ENCRYPTED PRIVATE KEY", b"Proc-Type: 4,ENCRYPTED"];

/// The PEM files of a TLS listener. With `client_roots`, clients must show a certificate that one of them has signed.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub client_roots: Option<PathBuf>,
}

/// The TLS side of a listener, which follows its files.
pub struct Tls {
    files: TlsFiles,
    acceptor: TlsAcceptor,
    stamps: Vec<Option<Stamp>>,
    looked: Instant,
    told: Option<String>,
}

impl Tls {
    /// Reads the files. The error is one line that says which file is wrong, and why.
    ///
    /// A client that offers protocols by ALPN without `h2` among them is refused in the handshake.
    pub fn load(files: TlsFiles) -> Result<Self, String> {
        // Looked at before they are read: a change in between is then seen as one later on.
        let stamps = stamps(&files);
        let acceptor = acceptor(&files)?;
        Ok(Self { files, acceptor, stamps, looked: Instant::now(), told: None })
    }

    /// What to accept the next connection with; connections that exist keep what they have.
    ///
    /// At most once a second the files are looked at, and read when they have changed: a few small files on the
    /// caller's thread. While what is there does not load, what was loaded before stays in use and the reading is
    /// tried again at the next look, as the files of a pair are often not replaced in one step. The text says why it
    /// does not load, once for each reason.
    pub fn acceptor(&mut self) -> (TlsAcceptor, Option<String>) {
        let news = self.look(Instant::now());
        (self.acceptor.clone(), news)
    }

    fn look(&mut self, now: Instant) -> Option<String> {
        if now.duration_since(self.looked) < LOOK_EVERY {
            return None;
        }
        self.looked = now;
        let stamps = stamps(&self.files);
        if stamps == self.stamps {
            self.told = None; // what was wrong is undone
            return None;
        }
        match acceptor(&self.files) {
            Ok(acceptor) => {
                (self.acceptor, self.stamps, self.told) = (acceptor, stamps, None);
                None
            }
            Err(reason) if self.told.as_ref() == Some(&reason) => None,
            Err(reason) => {
                self.told = Some(reason.clone());
                Some(reason)
            }
        }
    }
}

/// What changes with a file's contents; a link is followed, as secrets are often mounted as links that are swapped.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// One for each file; None for one that cannot be looked at.
fn stamps(files: &TlsFiles) -> Vec<Option<Stamp>> {
    [Some(&files.certificate), Some(&files.key), files.client_roots.as_ref()]
        .into_iter()
        .flatten()
        .map(|path| fs::metadata(path).ok().map(|found| Stamp::of(&found)))
        .collect()
}

fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, String> {
    // Named here, as the process may have no default provider, or several.
    let provider = Arc::new(default_provider());
    let identity = identity(files)?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS cannot be set up: {error}"))?;
    let builder = match &files.client_roots {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(path)?), provider)
                .build()
                .map_err(|error| wrong(path, error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(identity)));
    config.alpn_protocols = vec![HTTP2.to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// The server's chain with its key, which are known to belong together.
fn identity(files: &TlsFiles) -> Result<CertifiedKey, String> {
    let chain = certificates(&files.certificate)?;
    let key = private_key(&files.key)?;
    let key = any_supported_type(&key).map_err(|_| {
        let kinds = "RSA from 2048 bits, ECDSA on P-256 or P-384, Ed25519";
        wrong(&files.key, format!("the key is of no kind that can be used ({kinds}), or damaged"))
    })?;
    let identity = CertifiedKey::new(chain, key);
    match identity.keys_match() {
        Ok(()) => Ok(identity),
        Err(rustls::Error::InconsistentKeys(_)) => {
            let certificate = files.certificate.display();
            Err(wrong(&files.key, format!("the key does not fit the certificate in {certificate}")))
        }
        Err(error) => Err(wrong(&files.certificate, error)),
    }
}

/// The certificates that clients' certificates may be signed by.
fn roots(path: &Path) -> Result<RootCertStore, String> {
    let mut store = RootCertStore::empty();
    for root in certificates(path)? {
        store.add(root).map_err(|error| wrong(path, error))?;
    }
    Ok(store)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = read(path)?;
    let all: Vec<_> =
        CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|error| wrong(path, error))?;
    if all.is_empty() {
        return Err(wrong(path, "there is no PEM certificate in it"));
    }
    Ok(all)
}

/// The first key in the file: PKCS#8, PKCS#1 (RSA) or SEC1 (EC).
fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let pem = read(path)?;
    if ENCRYPTED_MARKS.iter().any(|mark| contains(&pem, mark)) {
        return Err(wrong(
            path,
            "the key is encrypted, and there is nobody to ask for its passphrase: store it without",
        ));
    }
    match PrivateKeyDer::from_pem_slice(&pem) {
        Err(pem::Error::NoItemsFound) => Err(wrong(path, "there is no PEM private key in it")),
        key => key.map_err(|error| wrong(path, error)),
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let mut data = Vec::new();
    let read = File::open(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut data));
    match read {
        Err(error) => Err(wrong(path, error)),
        Ok(_) if data.len() as u64 > FILE_BYTES_MAX => Err(wrong(path, "the file is too large for a PEM file")),
        Ok(_) => Ok(data),
    }
}

fn wrong(path: &Path, reason: impl Display) -> String {
    format!("{}: {reason}", path.display())
}

/// The names in a client's certificate, its subject's first: `cn:NAME`, then the alternative names as `dns:NAME`,
/// `uri:URI`, `ip:ADDRESS` and `email:ADDRESS`, each kind in the order of the certificate.
///
/// Empty without a client certificate. Only a connection with required client certificates makes them worth anything:
/// then the handshake has checked the certificate.
pub fn peer_names(connection: &ServerConnection) -> Vec<String> {
    let Some([certificate, ..]) = connection.peer_certificates() else {
        return Vec::new();
    };
    match X509Certificate::from_der(certificate) {
        Ok((_, certificate)) => names(&certificate),
        // The handshake's parser is another one; a certificate that only it understands has no names for us.
        Err(_) => Vec::new(),
    }
}

fn names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let common = certificate.subject().iter_common_name();
    let common = common.filter_map(|name| Some(format!("cn:{}", name.as_str().ok()?)));
    let alternative = certificate.subject_alternative_name().ok().flatten();
    let alternative = alternative.iter().flat_map(|extension| &extension.value.general_names);
    common.chain(alternative.filter_map(alternative_name)).collect()
}

fn alternative_name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some(format!("dns:{name}")),
        GeneralName::URI(name) => Some(format!("uri:{name}")),
        GeneralName::RFC822Name(name) => Some(format!("email:{name}")),
        GeneralName::IPAddress(bytes) => Some(format!("ip:{}", ip_address(bytes)?)),
        _ => None,
    }
}

fn ip_address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine as _;
    use base64::prelude::BASE64_STANDARD;
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection};
    use std::io;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio_rustls::TlsConnector;

    /// An authority, and a directory with files that it makes; gone at the end.
    struct Authority {
        issuer: CertifiedIssuer<'static, KeyPair>,
        directory: PathBuf,
    }

    struct Pair {
        certificate: String,
        key: KeyPair,
    }

    impl Authority {
        fn new(name: &str) -> Self {
            let directory = std::env::temp_dir().join(format!("sluice-tls-{}-{name}", std::process::id()));
            fs::create_dir_all(&directory).unwrap();
            let mut params = CertificateParams::new([]).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
            Self { issuer, directory }
        }

        fn issue(&self, names: Vec<SanType>) -> Pair {
            let mut params = CertificateParams::new([]).unwrap();
            params.distinguished_name.push(DnType::CommonName, "somebody");
            params.subject_alt_names = names;
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
            Pair { certificate, key }
        }

        fn server(&self) -> Pair {
            self.issue(vec![SanType::DnsName("localhost".try_into().unwrap())])
        }

        fn write(&self, name: &str, text: &str) -> PathBuf {
            let path = self.directory.join(name);
            fs::write(&path, text).unwrap();
            path
        }

        fn files(&self, pair: &Pair) -> TlsFiles {
            TlsFiles {
                certificate: self.write("cert.pem", &pair.certificate),
                key: self.write("key.pem", &pair.key.serialize_pem()),
                client_roots: None,
            }
        }

        fn client(&self, pair: Option<Pair>, protocols: &[&[u8]]) -> ClientConfig {
            let mut roots = RootCertStore::empty();
            roots.add(self.issuer.der().clone()).unwrap();
            let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(roots);
            let mut config = match pair {
                None => builder.with_no_client_auth(),
                Some(pair) => {
                    let chain = vec![CertificateDer::from_pem_slice(pair.certificate.as_bytes()).unwrap()];
                    let key = PrivateKeyDer::from_pem_slice(pair.key.serialize_pem().as_bytes()).unwrap();
                    builder.with_client_auth_cert(chain, key).unwrap()
                }
            };
            config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
            config
        }
    }

    impl Drop for Authority {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.directory).unwrap();
        }
    }

    /// What a served client leaves behind: the server's certificate, what was agreed by ALPN, the client's names.
    type Handshake = (CertificateDer<'static>, Option<Vec<u8>>, Vec<String>);

    fn handshake(acceptor: TlsAcceptor, client: ClientConfig) -> io::Result<Handshake> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (near, far) = duplex(1 << 16);
            let connector = TlsConnector::from(Arc::new(client));
            let client = connector.connect(ServerName::try_from("localhost").unwrap(), near);
            let serve = async {
                let mut stream = acceptor.accept(far).await?;
                stream.write_all(b"!").await?;
                stream.flush().await?;
                Ok::<_, io::Error>(stream)
            };
            let (client, server) = tokio::join!(client, serve);
            let (mut client, server) = (client?, server?);
            client.read_exact(&mut [0]).await?;
            Ok(facts(client.get_ref().1, server.get_ref().1))
        })
    }

    fn facts(client: &ClientConnection, server: &ServerConnection) -> Handshake {
        let certificate = client.peer_certificates().unwrap()[0].clone().into_owned();
        let protocol = server.alpn_protocol().map(<[u8]>::to_vec);
        (certificate, protocol, peer_names(server))
    }

    fn leaf(pair: &Pair) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(pair.certificate.as_bytes()).unwrap()
    }

    fn pem(label: &str, der: &[u8]) -> String {
        let body = BASE64_STANDARD.encode(der);
        format!("-----BEGIN {label}-----\n{body}\n-----END {label}-----\n")
    }

    /// The EC key of RFC 5915 that PKCS#8 has inside: an octet string after the version and the algorithm.
    fn sec1(key: &KeyPair) -> String {
        let der = key.serialize_der();
        let octets = der.windows(3).position(|at| at[0] == 0x04 && at[2] == 0x30);
        pem("EC PRIVATE KEY", &der[octets.unwrap() + 2..])
    }

    fn refusal(files: TlsFiles) -> String {
        Tls::load(files).err().unwrap()
    }

    /// A time at which the files are looked at again.
    fn later(tls: &Tls) -> Instant {
        tls.looked + LOOK_EVERY
    }

    #[test]
    fn a_client_that_knows_the_authority_is_served_over_http2() {
        let authority = Authority::new("served");
        let pair = authority.server();
        let mut tls = Tls::load(authority.files(&pair)).unwrap();
        let (acceptor, news) = tls.acceptor();
        assert_eq!(news, None);
        let served = handshake(acceptor, authority.client(None, &[b"http/1.1", HTTP2])).unwrap();
        assert_eq!(served, (leaf(&pair), Some(HTTP2.to_vec()), vec![]));
    }

    #[test]
    fn alpn_is_http2_or_nothing() {
        let authority = Authority::new("alpn");
        let mut tls = Tls::load(authority.files(&authority.server())).unwrap();
        let (acceptor, _) = tls.acceptor();
        let other = handshake(acceptor.clone(), authority.client(None, &[b"http/1.1"]));
        assert!(other.is_err());
        let (_, protocol, _) = handshake(acceptor, authority.client(None, &[])).unwrap();
        assert_eq!(protocol, None);
    }

    #[test]
    fn client_certificates_are_required_once_roots_are_set_and_their_names_are_told() {
        let (authority, stranger) = (Authority::new("mutual"), Authority::new("stranger"));
        let roots = authority.write("roots.pem", &authority.issuer.pem());
        let mut files = authority.files(&authority.server());
        files.client_roots = Some(roots);
        let (acceptor, _) = Tls::load(files).unwrap().acceptor();
        let names = || {
            vec![
                SanType::IpAddress("10.0.0.1".parse().unwrap()),
                SanType::IpAddress("fd00::1".parse().unwrap()),
                SanType::DnsName("client.example".try_into().unwrap()),
                SanType::URI("spiffe://example/ns/a".try_into().unwrap()),
                SanType::Rfc822Name("me@client.example".try_into().unwrap()),
            ]
        };
        let shown = authority.client(Some(authority.issue(names())), &[HTTP2]);
        let (_, _, told) = handshake(acceptor.clone(), shown).unwrap();
        let expected =
            "cn:somebody ip:10.0.0.1 ip:fd00::1 dns:client.example uri:spiffe://example/ns/a email:me@client.example";
        assert_eq!(told.join(" "), expected);
        let of_another = authority.client(Some(stranger.issue(names())), &[HTTP2]);
        assert!(handshake(acceptor.clone(), of_another).is_err());
        assert!(handshake(acceptor, authority.client(None, &[HTTP2])).is_err());
    }

    #[test]
    fn a_key_may_have_its_older_form() {
        let authority = Authority::new("sec1");
        let pair = authority.server();
        let mut files = authority.files(&pair);
        files.key = authority.write("sec1.pem", &sec1(&pair.key));
        let (acceptor, _) = Tls::load(files).unwrap().acceptor();
        handshake(acceptor, authority.client(None, &[HTTP2])).unwrap();
    }

    #[test]
    fn an_error_names_the_file_and_what_is_wrong_with_it() {
        let authority = Authority::new("wrong");
        let pair = authority.server();
        let good = authority.files(&pair);
        let key = pair.key.serialize_pem();
        let other = authority.server().key.serialize_pem();
        let junk = authority.write("junk.pem", "no PEM");
        let cases = [
            (authority.directory.join("none.pem"), "No such file"),
            (junk.clone(), "there is no PEM private key in it"),
            (authority.write("cut.pem", &key[..key.len() / 2]), "cut.pem: "),
            (authority.write("damaged.pem", &pem("PRIVATE KEY", b"0123456789")), "of no kind that can be used"),
            (authority.write("other.pem", &other), "the key does not fit the certificate in "),
            (authority.write("secret.pem", &pem("ENCRYPTED PRIVATE KEY", b"?")), "the key is encrypted"),
            (
                authority.write("old.pem", "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n"),
                "the key is encrypted",
            ),
        ];
        for (path, reason) in cases {
            let text = refusal(TlsFiles { key: path.clone(), ..good.clone() });
            assert!(text.starts_with(&format!("{}: ", path.display())) && text.contains(reason), "{text}");
        }
        for files in [
            TlsFiles { certificate: junk.clone(), ..good.clone() },
            TlsFiles { client_roots: Some(junk.clone()), ..good.clone() },
        ] {
            assert_eq!(refusal(files), format!("{}: there is no PEM certificate in it", junk.display()));
        }
        let damaged = authority.write("damaged-cert.pem", &pem("CERTIFICATE", b"0123456789"));
        for files in [
            TlsFiles { certificate: damaged.clone(), ..good.clone() },
            TlsFiles { client_roots: Some(damaged.clone()), ..good.clone() },
        ] {
            assert!(refusal(files).starts_with(&format!("{}: ", damaged.display())));
        }
        let endless = TlsFiles { certificate: "/dev/zero".into(), ..good };
        assert_eq!(refusal(endless), "/dev/zero: the file is too large for a PEM file");
    }

    #[test]
    fn a_new_pair_is_taken_within_a_second_and_half_a_pair_is_not() {
        let authority = Authority::new("rotated");
        let (old, new) = (authority.server(), authority.server());
        let mut tls = Tls::load(authority.files(&old)).unwrap();
        let served = |tls: &Tls| handshake(tls.acceptor.clone(), authority.client(None, &[HTTP2])).unwrap().0;
        authority.write("cert.pem", &new.certificate);
        let too_early = later(&tls) - Duration::from_nanos(1);
        assert_eq!(tls.look(too_early), None);
        let told = tls.look(later(&tls)).unwrap();
        assert!(told.contains("the key does not fit the certificate"), "{told}");
        assert_eq!(tls.look(later(&tls)), None); // said once
        assert_eq!(served(&tls), leaf(&old));
        authority.write("key.pem", &new.key.serialize_pem());
        assert_eq!(tls.look(later(&tls)), None);
        assert_eq!(served(&tls), leaf(&new));
    }

    #[test]
    fn files_that_go_and_come_back_as_they_were_are_no_change() {
        let authority = Authority::new("gone");
        let files = authority.files(&authority.server());
        let mut tls = Tls::load(files.clone()).unwrap();
        let aside = authority.directory.join("aside.pem");
        fs::rename(&files.key, &aside).unwrap();
        assert!(tls.look(later(&tls)).unwrap().contains("No such file"));
        fs::rename(&aside, &files.key).unwrap();
        assert_eq!(tls.look(later(&tls)), None);
        fs::remove_file(&files.key).unwrap();
        assert!(tls.look(later(&tls)).unwrap().contains("No such file"));
    }
}
