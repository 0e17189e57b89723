//! What the bucket says to each request, in S3's own words.
//! <https://docs.aws.amazon.com/AmazonS3/latest/API/API_Operations_Amazon_Simple_Storage_Service.html>

#![expect(clippy::format_push_string, reason = "it is a few kilobytes at most")]

use std::collections::BTreeMap;
use std::ops::Bound;

use bytes::Bytes;

use super::{Answer, BUCKET, Object, Request, State, Upload};

/// The most keys of a list, as in S3.
const PAGE: usize = 1000;
/// Sorts behind every key of a folder.
const LAST: char = char::MAX;
const DATE: &str = "2026-01-01T00:00:00.000Z";

fn plain(status: &'static str, body: impl Into<Bytes>) -> Answer {
    let body = body.into();
    Answer {
        status,
        headers: "Content-Type: application/xml\r\n".to_owned(),
        length: body.len(),
        body: vec![body],
        file: None,
    }
}

fn error(status: &'static str, code: &str) -> Answer {
    plain(status, format!("<Error><Code>{code}</Code></Error>"))
}

fn tagged(status: &'static str, etag: &str) -> Answer {
    let mut answer = plain(status, "");
    answer.headers = format!("ETag: \"{etag}\"\r\n");
    answer
}

impl State {
    pub(super) fn begin(&mut self) {
        self.counts.now += 1;
        self.counts.most = self.counts.most.max(self.counts.now);
    }

    fn next(&mut self) -> String {
        self.number += 1;
        format!("{:032x}", self.number)
    }

    pub(super) fn lay(&mut self, key: &str, pieces: Vec<Bytes>) -> String {
        let etag = self.next();
        let object = Object {
            pieces,
            file: None,
            etag: etag.clone(),
        };
        self.objects.insert(key.to_owned(), object);
        etag
    }

    pub(super) fn answer(&mut self, request: &Request) -> Answer {
        let has = |name: &str| request.query.contains_key(name);
        match request.operation() {
            "LIST" if has("uploads") => self.uploads(request),
            "LIST" => self.list(request),
            "GET" if has("uploadId") => self.parts(request),
            "GET" | "HEAD" => self.get(request),
            "PUT" | "COPY" => self.put(request),
            "POST" if has("delete") => self.delete_many(request),
            "POST" if has("uploads") => self.create(request),
            "POST" => self.complete(request),
            _ => {
                match request.query("uploadId") {
                    Some(id) => drop(self.uploads.remove(id)),
                    None => drop(self.objects.remove(&request.key)),
                }
                plain("204 No Content", "")
            }
        }
    }

    fn get(&self, request: &Request) -> Answer {
        let Some(object) = self.objects.get(&request.key) else {
            return error("404 Not Found", "NoSuchKey");
        };
        let (size, etag) = (object.size(), format!("\"{}\"", object.etag));
        if request.header("if-none-match") == Some(&etag) {
            return tagged("304 Not Modified", &object.etag);
        }
        if request.header("if-match").is_some_and(|it| it != etag) {
            return error("412 Precondition Failed", "PreconditionFailed");
        }
        let mut headers = format!(
            "ETag: {etag}\r\nAccept-Ranges: bytes\r\nContent-Type: application/octet-stream\r\n\
             Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
        );
        let (status, from, to) = match request.range(size) {
            None => ("200 OK", 0, size),
            Some(Err(())) => return error("416 Range Not Satisfiable", "InvalidRange"),
            Some(Ok((from, to))) => {
                headers += &format!("Content-Range: bytes {from}-{}/{size}\r\n", to - 1);
                ("206 Partial Content", from, to)
            }
        };
        Answer {
            status,
            headers,
            body: object.part(from, to),
            file: object.file.clone().map(|file| (file, from)),
            length: to - from,
        }
    }

    /// An object, or a part of one: what was sent, or a copy.
    fn put(&mut self, request: &Request) -> Answer {
        let there = self.objects.get(&request.key);
        let is = |etag: &str| there.is_some_and(|it| etag == format!("\"{}\"", it.etag));
        if request.header("if-none-match") == Some("*") && there.is_some()
            || request.header("if-match").is_some_and(|etag| !is(etag))
        {
            return error("412 Precondition Failed", "PreconditionFailed");
        }
        let pieces = match request.header("x-amz-copy-source") {
            None => vec![request.body.clone()],
            Some(source) => {
                let source = percent_encoding::percent_decode_str(source).decode_utf8_lossy();
                let source = source.trim_start_matches('/').strip_prefix(BUCKET);
                let source = source.unwrap_or_default().trim_start_matches('/');
                let Some(object) = self.objects.get(source) else {
                    return error("404 Not Found", "NoSuchKey");
                };
                let range = request.header("x-amz-copy-source-range");
                let range = range.and_then(|it| it.strip_prefix("bytes=")?.split_once('-'));
                let number = |text: &str| text.parse::<usize>().expect("a number");
                let (from, to) = range.map_or((0, object.size()), |(from, last)| {
                    (number(from), number(last) + 1)
                });
                object.part(from, to)
            }
        };
        let etag = match (request.query("uploadId"), request.query("partNumber")) {
            (Some(id), Some(part)) => {
                let etag = self.next();
                let Some(upload) = self.uploads.get_mut(id) else {
                    return error("404 Not Found", "NoSuchUpload");
                };
                let object = Object {
                    pieces,
                    file: None,
                    etag: etag.clone(),
                };
                let part = part.parse().expect("a part's number");
                upload.parts.insert(part, object);
                etag
            }
            _ => self.lay(&request.key, pieces),
        };
        if request.operation() == "COPY" {
            return plain(
                "200 OK",
                format!(
                    "<CopyPartResult><LastModified>{DATE}</LastModified><ETag>\"{etag}\"</ETag></CopyPartResult>"
                ),
            );
        }
        tagged("200 OK", &etag)
    }

    fn create(&mut self, request: &Request) -> Answer {
        let id = self.next();
        let upload = Upload {
            key: request.key.clone(),
            parts: BTreeMap::new(),
        };
        self.uploads.insert(id.clone(), upload);
        let text = format!(
            "<InitiateMultipartUploadResult><Bucket>{BUCKET}</Bucket><Key>{}</Key><UploadId>{id}</UploadId></InitiateMultipartUploadResult>",
            request.key
        );
        plain("200 OK", text)
    }

    fn complete(&mut self, request: &Request) -> Answer {
        let id = request.query("uploadId").unwrap_or_default();
        let Some(upload) = self.uploads.remove(id) else {
            return error("404 Not Found", "NoSuchUpload");
        };
        let parts = upload.parts.into_values();
        let etag = self.lay(&request.key, parts.flat_map(|part| part.pieces).collect());
        let text = format!(
            "<CompleteMultipartUploadResult><Bucket>{BUCKET}</Bucket><Key>{}</Key><ETag>\"{etag}\"</ETag></CompleteMultipartUploadResult>",
            request.key
        );
        plain("200 OK", text)
    }

    fn uploads(&self, request: &Request) -> Answer {
        let prefix = request.query("prefix").unwrap_or_default();
        let mut text = "<ListMultipartUploadsResult><IsTruncated>false</IsTruncated>".to_owned();
        for (id, upload) in &self.uploads {
            if upload.key.starts_with(prefix) {
                text += &format!(
                    "<Upload><Key>{}</Key><UploadId>{id}</UploadId><Initiated>{DATE}</Initiated></Upload>",
                    upload.key
                );
            }
        }
        plain("200 OK", text + "</ListMultipartUploadsResult>")
    }

    fn parts(&self, request: &Request) -> Answer {
        let id = request.query("uploadId").unwrap_or_default();
        let Some(upload) = self.uploads.get(id) else {
            return error("404 Not Found", "NoSuchUpload");
        };
        let mut text = "<ListPartsResult><IsTruncated>false</IsTruncated>".to_owned();
        for (number, part) in &upload.parts {
            text += &format!(
                "<Part><PartNumber>{number}</PartNumber><LastModified>{DATE}</LastModified><ETag>\"{}\"</ETag><Size>{}</Size></Part>",
                part.etag,
                part.size()
            );
        }
        plain("200 OK", text + "</ListPartsResult>")
    }

    fn delete_many(&mut self, request: &Request) -> Answer {
        let text = String::from_utf8_lossy(&request.body);
        for rest in text.split("<Key>").skip(1) {
            let key = rest.split("</Key>").next().unwrap_or_default();
            self.objects.remove(key);
        }
        plain("200 OK", "<DeleteResult></DeleteResult>")
    }

    /// `ListObjectsV2`, and `ListObjects`, of which docker-registry makes some of its lists.
    fn list(&self, request: &Request) -> Answer {
        let prefix = request.query("prefix").unwrap_or_default();
        let most = request.query("max-keys").and_then(|most| most.parse().ok());
        let most = most.unwrap_or(PAGE).min(PAGE);
        let token = request.query("continuation-token");
        let token = token.or(request.query("marker")).map(|token| {
            // Of an answer that ended with a folder.
            let folder = token.ends_with('/').then_some(LAST);
            token.chars().chain(folder).collect::<String>()
        });
        let mut after = token.or(request.query("start-after").map(str::to_owned));
        let (mut text, mut count, mut more) = (String::new(), 0, None);
        loop {
            let from = match &after {
                Some(after) if after.as_str() >= prefix => Bound::Excluded(after.as_str()),
                _ => Bound::Included(prefix),
            };
            let next = self
                .objects
                .range::<str, _>((from, Bound::Unbounded))
                .next();
            let Some((key, object)) = next.filter(|(key, _)| key.starts_with(prefix)) else {
                more = None;
                break;
            };
            if count == most {
                break;
            }
            count += 1;
            let delimiter = request.query("delimiter").filter(|it| !it.is_empty());
            let end = delimiter.and_then(|it| Some(key[prefix.len()..].find(it)? + it.len()));
            let (token, skip) = match end {
                Some(end) => {
                    let folder = &key[..prefix.len() + end];
                    text += &format!("<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>");
                    (folder.to_owned(), format!("{folder}{LAST}"))
                }
                None => {
                    text += &format!(
                        "<Contents><Key>{key}</Key><LastModified>{DATE}</LastModified><ETag>\"{}\"</ETag><Size>{}</Size></Contents>",
                        object.etag,
                        object.size()
                    );
                    (key.clone(), key.clone())
                }
            };
            (more, after) = (Some(token), Some(skip));
        }
        let next = more.as_ref().map_or(String::new(), |token| {
            format!(
                "<NextContinuationToken>{token}</NextContinuationToken><NextMarker>{token}</NextMarker>"
            )
        });
        plain(
            "200 OK",
            format!(
                "<ListBucketResult><Name>{BUCKET}</Name><Prefix>{prefix}</Prefix><KeyCount>{count}</KeyCount>\
                 <MaxKeys>{most}</MaxKeys><IsTruncated>{}</IsTruncated>{next}{text}</ListBucketResult>",
                more.is_some()
            ),
        )
    }
}
