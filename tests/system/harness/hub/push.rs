//! Filling the Hub, by the distribution API's push.

use bytes::Bytes;
use http::{Method, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use super::registry::ADDRESS;
use crate::harness::image::Image;

/// Pushes an image straight into the registry, past the front and its records.
pub fn push(
    token: String,
    repository: String,
    tag: String,
    image: &Image,
) -> impl Future<Output = ()> + Send + use<> {
    let copy = |bytes: &Vec<u8>| Bytes::copy_from_slice(bytes);
    let blobs: Vec<(String, Bytes)> = image
        .blobs
        .iter()
        .map(|blob| (blob.digest.clone(), copy(&blob.bytes)))
        .collect();
    let mut manifests: Vec<(String, &'static str, Bytes)> = image
        .manifests
        .iter()
        .map(|manifest| {
            (
                manifest.digest.clone(),
                manifest.media_type,
                copy(&manifest.bytes),
            )
        })
        .collect();
    manifests.last_mut().expect("an image has a manifest").0 = tag;
    async move {
        let client = Pusher {
            client: Client::builder(TokioExecutor::new()).build_http(),
            token,
        };
        let base = format!("http://{ADDRESS}/v2/{repository}");
        for (digest, bytes) in blobs {
            let begun = client
                .send(
                    Method::POST,
                    &format!("{base}/blobs/uploads/"),
                    "",
                    Bytes::new(),
                )
                .await;
            let location = begun.headers()[header::LOCATION]
                .to_str()
                .expect("a textual Location");
            let location = format!("{location}&digest={digest}");
            client
                .send(Method::PUT, &location, "application/octet-stream", bytes)
                .await;
        }
        for (reference, media_type, bytes) in manifests {
            client
                .send(
                    Method::PUT,
                    &format!("{base}/manifests/{reference}"),
                    media_type,
                    bytes,
                )
                .await;
        }
    }
}

struct Pusher {
    client: Client<HttpConnector, Full<Bytes>>,
    token: String,
}

impl Pusher {
    async fn send(
        &self,
        method: Method,
        uri: &str,
        media_type: &str,
        body: Bytes,
    ) -> Response<Incoming> {
        let request = http::Request::builder()
            .method(&method)
            .uri(uri)
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token))
            .header(header::CONTENT_TYPE, media_type)
            .body(Full::new(body))
            .expect("a request");
        let answer = self.client.request(request).await;
        let answer = answer.unwrap_or_else(|error| panic!("{method} {uri}: {error}"));
        let status = answer.status();
        if status == StatusCode::ACCEPTED || status == StatusCode::CREATED {
            return answer;
        }
        let body = answer
            .into_body()
            .collect()
            .await
            .map(http_body_util::Collected::to_bytes);
        panic!("{method} {uri}: {status} {body:?}");
    }
}
