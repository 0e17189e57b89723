//! The running agent, as its clients see it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use http::header::ACCEPT;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use indicatif::{DecimalBytes, ProgressBar};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::Error;
use crate::config::{Serving, TlsSettings};
use crate::oci::{Algorithm, Digest, ErrorBody, ImageName, MANIFEST_LIMIT, Manifest, Reference};
use crate::resolve::{self, Connector};
use crate::tls;
use crate::upstream::CONTENT_DIGEST;

/// What an error answer is read of, in bytes.
const ERROR_LIMIT: usize = 64 * 1024;
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, \
                         application/vnd.oci.image.manifest.v1+json, \
                         application/vnd.docker.distribution.manifest.list.v2+json, \
                         application/vnd.docker.distribution.manifest.v2+json";

/// What the agent is shown where it lets only clients with a certificate in.
#[derive(Debug, Clone)]
pub struct ClientIdentity {
    /// The certificate, in PEM.
    pub certificate: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
}

/// The agent, as its clients see it.
pub(super) struct Agent {
    client: Client<HttpsConnector<Connector>, Empty<Bytes>>,
    scheme: &'static str,
    address: SocketAddr,
}

impl Agent {
    /// The agent that runs with these settings.
    pub(super) fn new(
        settings: &Serving,
        identity: Option<&ClientIdentity>,
    ) -> Result<Self, Error> {
        let mut address = settings.listen;
        if address.ip().is_unspecified() {
            // All interfaces of either family have this one.
            address.set_ip(IpAddr::V4(Ipv4Addr::LOCALHOST));
        }
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls_config(settings.tls.as_ref(), identity)?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(resolve::connector());
        Ok(Self {
            client: Client::builder(TokioExecutor::new()).build(connector),
            scheme: settings.tls.as_ref().map_or("http", |_| "https"),
            address,
        })
    }

    /// A manifest, or an index.
    pub(super) async fn manifest(
        &self,
        image: &ImageName,
        reference: &Reference,
    ) -> Result<Manifest, Error> {
        let answer = self.get(image, &format!("manifests/{reference}")).await?;
        let digest = match reference {
            Reference::Digest(digest) => Some(digest.clone()),
            Reference::Tag(_) => answer
                .headers()
                .get(CONTENT_DIGEST)
                .and_then(|digest| digest.to_str().ok()?.parse().ok()),
        };
        let bytes = Limited::new(answer.into_body(), MANIFEST_LIMIT).collect();
        let bytes = bytes.await?.to_bytes();
        let digest = digest.unwrap_or_else(|| Digest::of(Algorithm::Sha256, &bytes));
        Ok(Manifest::parse(bytes, digest)?)
    }

    /// Reads a blob and keeps nothing of it: the agent does. Returns its size in bytes.
    pub(super) async fn blob(
        &self,
        image: &ImageName,
        digest: &Digest,
        bar: &ProgressBar,
    ) -> Result<u64, Error> {
        let mut body = self
            .get(image, &format!("blobs/{digest}"))
            .await?
            .into_body();
        if let Some(size) = hyper::body::Body::size_hint(&body).exact() {
            bar.set_length(size);
        }
        let mut read = 0;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                format!("the agent broke off after {}: {error}", DecimalBytes(read))
            })?;
            let length = frame.data_ref().map_or(0, Bytes::len) as u64;
            read += length;
            bar.inc(length);
        }
        Ok(read)
    }

    async fn get(&self, image: &ImageName, what: &str) -> Result<Response<Incoming>, Error> {
        let (name, registry) = (&image.name, &image.registry);
        let uri = format!(
            "{}://{}/v2/{name}/{what}?ns={registry}",
            self.scheme, self.address
        );
        let request = Request::get(uri)
            .header(ACCEPT, MANIFESTS)
            .body(Empty::new())?;
        let answer = self.client.request(request).await.map_err(|error| {
            let why =
                std::error::Error::source(&error).map_or(String::new(), |why| format!(": {why}"));
            let address = self.address;
            format!("can't ask the agent at {address}: {error}{why}; is it running?")
        })?;
        if answer.status() == StatusCode::OK {
            return Ok(answer);
        }
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ERROR_LIMIT).collect();
        let body = body.await.map(http_body_util::Collected::to_bytes);
        let told = body.ok().and_then(|body| ErrorBody::message(&body));
        Err(told
            .unwrap_or_else(|| format!("the agent answered {status}"))
            .into())
    }
}

fn tls_config(
    server: Option<&TlsSettings>,
    client: Option<&ClientIdentity>,
) -> Result<ClientConfig, Error> {
    let builder = ClientConfig::builder_with_provider(tls::provider())
        .with_safe_default_protocol_versions()?;
    let Some(server) = server else {
        // It is never asked by https then, so that nobody needs to be trusted.
        let nobody = RootCertStore::empty();
        return Ok(builder.with_root_certificates(nobody).with_no_client_auth());
    };
    let shown = tls::certificates("certificate", &server.certificate)?;
    let only = shown
        .into_iter()
        .next()
        .ok_or("the certificate's file is empty")?;
    let builder = builder
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Only {
            certificate: only,
            provider: tls::provider(),
        }));
    Ok(match client {
        None => builder.with_no_client_auth(),
        Some(client) => builder.with_client_auth_cert(
            tls::certificates("certificate", &client.certificate)?,
            tls::private_key("key", &client.key)?,
        )?,
    })
}

/// Trusts the one certificate that the agent is configured to show, whatever its names: the agent
/// is asked at its own host's address, for which no authority signs. Who has its key is the agent.
#[derive(Debug)]
struct Only {
    certificate: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Only {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if *end_entity == self.certificate {
            return Ok(ServerCertVerified::assertion());
        }
        let message = "it shows another certificate than its configuration names";
        Err(rustls::Error::General(message.to_owned()))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = &self.provider.signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}
