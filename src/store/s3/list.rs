//! Lists of a bucket, a page at a time, by LIST with a delimiter: what it costs is what is in the
//! page, and nothing is ever walked key by key.

use std::collections::{BTreeMap, HashSet};
use std::time::SystemTime;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::super::Page;
use super::{AT_ONCE, Bucket, BucketError, layout};
use crate::oci::{Digest, Tag};
use crate::store::layout::Repository;

/// One answer of LIST.
pub(super) struct Listing {
    /// The names of the folders, without the folder they are in and without a `/`.
    pub(super) folders: Vec<String>,
    /// The keys.
    pub(super) files: Vec<Object>,
    /// How to go on, if there is more.
    pub(super) more: Option<String>,
}

/// A key, as LIST has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Object {
    /// Its name, without what was listed.
    pub(super) name: String,
    /// In bytes.
    pub(super) size: u64,
    /// When it was written, by S3's clock; of one that came in parts, when it was begun. `None`
    /// where the store does not say.
    pub(super) modified: Option<SystemTime>,
}

/// Where LIST is to begin.
#[derive(Clone, Copy)]
pub(super) enum From<'a> {
    /// After a name in the folder.
    After(&'a str),
    /// Where an answer ended.
    Token(&'a str),
}

impl Bucket {
    /// The folders and files right in a folder, at most `most` or 1000, from somewhere on.
    pub(super) async fn list(
        &self,
        folder: &str,
        most: Option<i32>,
        from: Option<From<'_>>,
    ) -> Result<Listing, BucketError> {
        self.list_with(folder, Some("/"), most, from).await
    }

    async fn list_with(
        &self,
        folder: &str,
        delimiter: Option<&str>,
        most: Option<i32>,
        from: Option<From<'_>>,
    ) -> Result<Listing, BucketError> {
        let prefix = format!("{folder}/");
        self.list_prefix(&prefix, delimiter, most, from).await
    }

    /// The keys whose paths begin with this, without a delimiter: also those of folders below it.
    pub(super) async fn objects(
        &self,
        prefix: &str,
        token: Option<&str>,
    ) -> Result<Listing, BucketError> {
        let from = token.map(From::Token);
        self.list_prefix(prefix, None, None, from).await
    }

    async fn list_prefix(
        &self,
        prefix: &str,
        delimiter: Option<&str>,
        most: Option<i32>,
        from: Option<From<'_>>,
    ) -> Result<Listing, BucketError> {
        let prefix = self.0.prefix.key(prefix);
        let mut request = self.0.clients.small.list_objects_v2();
        request = request
            .bucket(self.name())
            .prefix(&prefix)
            .set_delimiter(delimiter.map(str::to_owned))
            .set_max_keys(most);
        request = match from {
            Some(From::After(name)) => request.start_after(format!("{prefix}{name}")),
            Some(From::Token(token)) => request.continuation_token(token),
            None => request,
        };
        let what = format!("LIST {prefix}");
        let answer = request.send().await.map_err(|error| {
            let refusal = self.0.asker.refusal(&what, &error);
            self.0.asker.error(&what, "s3:ListBucket", refusal)
        })?;
        let name = |key: Option<String>| -> Option<String> {
            let name = key?.strip_prefix(&prefix)?.trim_end_matches('/').to_owned();
            (!name.is_empty()).then_some(name)
        };
        let folders = answer.common_prefixes.unwrap_or_default();
        let files = answer.contents.unwrap_or_default();
        Ok(Listing {
            folders: folders
                .into_iter()
                .filter_map(|it| name(it.prefix))
                .collect(),
            files: files
                .into_iter()
                .filter_map(|file| {
                    Some(Object {
                        size: u64::try_from(file.size.unwrap_or_default()).unwrap_or_default(),
                        modified: file.last_modified.and_then(|at| at.try_into().ok()),
                        name: name(file.key)?,
                    })
                })
                .collect(),
            more: answer
                .next_continuation_token
                .filter(|_| answer.is_truncated == Some(true)),
        })
    }

    /// Whether there is any key in a folder, however deep.
    pub(super) async fn is_folder(&self, folder: &str) -> Result<bool, BucketError> {
        let listing = self.list_with(folder, None, Some(1), None).await?;
        Ok(!listing.files.is_empty())
    }

    /// Whether there is anything of a repository, be it a layer alone.
    pub async fn exists(&self, of: &Repository) -> Result<bool, BucketError> {
        // Its own folders begin with `_`; others are of repositories below it.
        let after = Some(From::After("_"));
        let listing = self.list(&layout::repository(of), Some(1), after).await?;
        Ok(listing.folders.iter().any(|name| name.starts_with('_')))
    }

    /// The paths of all keys in a folder, however deep; more than `limit` are an error.
    pub(super) async fn files(
        &self,
        folder: &str,
        limit: usize,
    ) -> Result<Vec<String>, BucketError> {
        let mut paths = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let from = token.as_deref().map(From::Token);
            let listing = self.list_with(folder, None, None, from).await?;
            let names = listing.files.into_iter();
            paths.extend(names.map(|file| format!("{folder}/{}", file.name)));
            if paths.len() > limit {
                return Err(self.wrong(folder, format!("has more than {limit} keys")));
            }
            token = listing.more;
            if token.is_none() {
                return Ok(paths);
            }
        }
    }

    /// The tags of a repository, in their order. A folder without `current/link` is not a tag.
    pub async fn tags(&self, of: &Repository, page: &Page) -> Result<Vec<Tag>, BucketError> {
        let mut places = Places::new(self, layout::tags(of), &page.after);
        let mut found: Vec<Tag> = Vec::new();
        while found.len() < page.limit {
            let Some(batch) = places.next().await? else {
                break;
            };
            let tags = batch.into_iter().filter(|place| !place.ends_with('/'));
            let tags = tags.filter(|name| *name > page.after);
            let tags: Vec<Tag> = tags.filter_map(|name| name.parse().ok()).collect();
            let mut tags = tags.as_slice();
            // No more are looked at ahead than may be wanted.
            while let wanted @ 1.. = tags.len().min(page.limit - found.len()) {
                let (these, rest) = tags.split_at(wanted);
                found.extend(self.those_there(of, these).await?);
                tags = rest;
            }
        }
        Ok(found)
    }

    /// Those of these names that are tags, in their order.
    ///
    /// Where they are many, LIST without a delimiter tells of hundreds at once. It also brings all
    /// that each tag was before: where that makes it tell of few, each is asked for by itself.
    async fn those_there(&self, of: &Repository, tags: &[Tag]) -> Result<Vec<Tag>, BucketError> {
        let link = |tag: &Tag| format!("{tag}/current/link");
        // In the order of S3, which is not that of their names.
        let mut unknown = tags.to_vec();
        unknown.sort_by_cached_key(link);
        let mut there: HashSet<Tag> = HashSet::new();
        while unknown.len() > AT_ONCE {
            let after = From::After(unknown[0].as_str());
            let folder = layout::tags(of);
            let listing = self.list_with(&folder, None, None, Some(after)).await?;
            let files: HashSet<&str> = listing
                .files
                .iter()
                .map(|file| file.name.as_str())
                .collect();
            // What is behind the last key is in another answer.
            let told = match (listing.more, listing.files.last()) {
                (Some(_), Some(last)) => unknown.partition_point(|tag| link(tag) <= last.name),
                _ => unknown.len(),
            };
            let listed = unknown.drain(..told);
            there.extend(listed.filter(|tag| files.contains(link(tag).as_str())));
            if told < AT_ONCE {
                break;
            }
        }
        let looks = unknown.into_iter().map(async |tag: Tag| {
            let key = self.0.prefix.key(&layout::tag_link(of, &tag));
            let size = self.size(&key).await?;
            Ok::<_, BucketError>(size.map(|_| tag))
        });
        let looks = stream::iter(looks).buffer_unordered(AT_ONCE);
        let rest: Vec<Option<Tag>> = looks.try_collect().await?;
        there.extend(rest.into_iter().flatten());
        let such = tags.iter().filter(|tag| there.contains(*tag));
        Ok(such.cloned().collect())
    }

    /// Which tags of a repository are this manifest.
    pub async fn tags_of(&self, of: &Repository, digest: &Digest) -> Result<Vec<Tag>, BucketError> {
        let all = self.tags(of, &Page::all()).await?;
        let such = stream::iter(all.into_iter().map(async |tag: Tag| {
            let link = self.tag(of, &tag).await?;
            let is = link.is_some_and(|link| link.digest == *digest);
            Ok::<_, BucketError>(is.then_some(tag))
        }));
        let such = such.buffered(AT_ONCE);
        such.try_filter_map(async |tag| Ok(tag)).try_collect().await
    }

    /// The repositories that have manifests, in the order of their names.
    pub async fn repositories(&self, page: &Page) -> Result<Vec<Repository>, BucketError> {
        self.repositories_with(&[layout::MANIFESTS], page).await
    }

    /// The repositories that have one of these folders, in the order of their names.
    pub(super) async fn repositories_with(
        &self,
        having: &[&str],
        page: &Page,
    ) -> Result<Vec<Repository>, BucketError> {
        let mut found = Vec::new();
        self.walk("", having, page, &mut found).await?;
        Ok(found)
    }

    /// Finds the repositories below `within` (empty, or with a `/` at its end).
    fn walk<'a>(
        &'a self,
        within: &'a str,
        having: &'a [&'a str],
        page: &'a Page,
        found: &'a mut Vec<Repository>,
    ) -> BoxFuture<'a, Result<(), BucketError>> {
        async move {
            let root = layout::repositories();
            let folder = format!("{root}/{within}");
            let after = page.after.strip_prefix(within).unwrap_or_default();
            let after = after.split('/').next().unwrap_or_default();
            let folder = folder.trim_end_matches('/').to_owned();
            let mut places = Places::new(self, folder, after);
            while found.len() < page.limit {
                let Some(batch) = places.next().await? else {
                    break;
                };
                let batch: Vec<String> = batch
                    .into_iter()
                    // What begins with `_` is of the repository `within`, and no part of a name.
                    .filter(|name| !name.starts_with('_'))
                    .map(|name| format!("{within}{name}"))
                    .filter(|place| {
                        *place > page.after
                            || (place.ends_with('/') && page.after.starts_with(place.as_str()))
                    })
                    .collect();
                let mut seen = BTreeMap::new();
                let mut rest = batch.as_slice();
                while let Some(place) = rest.first() {
                    let left = page.limit - found.len();
                    if left == 0 {
                        break;
                    }
                    let name = place.trim_end_matches('/');
                    if !seen.contains_key(name) {
                        // A place is looked at once, as itself and for what is below it.
                        let mut names: Vec<String> = Vec::new();
                        for place in rest {
                            let name = place.trim_end_matches('/');
                            if !seen.contains_key(name) && !names.iter().any(|it| it == name) {
                                names.push(name.to_owned());
                            }
                            if names.len() == left.min(AT_ONCE) {
                                break;
                            }
                        }
                        seen.extend(self.look_at(names, having).await?);
                    }
                    let Some(look) = seen.get(name) else { continue };
                    rest = &rest[1..];
                    if !place.ends_with('/') && look.is_repository {
                        found.push(Repository::from_path(name.to_owned()));
                    } else if place.ends_with('/') && look.has_others {
                        self.walk(place, having, page, found).await?;
                    }
                }
            }
            Ok(())
        }
        .boxed()
    }

    /// Looks into folders of repositories, all at once.
    async fn look_at(
        &self,
        names: Vec<String>,
        having: &[&str],
    ) -> Result<Vec<(String, Look)>, BucketError> {
        let looks = names.into_iter().map(async |name: String| {
            let folder = layout::repository(&Repository::from_path(name.clone()));
            Ok((name, self.look(&folder, having).await?))
        });
        stream::iter(looks)
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await
    }

    async fn look(&self, folder: &str, having: &[&str]) -> Result<Look, BucketError> {
        let listing = self.list(folder, None, None).await?;
        let mut is_repository = listing
            .folders
            .iter()
            .any(|name| having.contains(&name.as_str()));
        for name in having {
            if !is_repository && listing.more.is_some() {
                is_repository = self.is_folder(&format!("{folder}/{name}")).await?;
            }
        }
        Ok(Look {
            is_repository,
            has_others: listing.more.is_some()
                || listing.folders.iter().any(|name| !name.starts_with('_')),
        })
    }
}

/// What there is in a folder of repositories.
struct Look {
    /// What was looked for: it is one itself.
    is_repository: bool,
    /// Folders that may be, or hold, others.
    has_others: bool,
}

/// The folders in a folder in the order of their names: each once as itself, and once with a `/` at
/// its end, for what is below it.
///
/// That is not the order of S3, which sorts `a-b/` before `a/`, since `-` and `.` are before `/`.
/// Where an answer ends with `a-b/`, an `a/` may follow in the next one: so it is looked for at once,
/// and with it everything up to there is known.
struct Places<'a> {
    bucket: &'a Bucket,
    folder: String,
    after: String,
    token: Option<String>,
    ended: bool,
    /// Those that were looked for before their turn, and whether they are there.
    early: BTreeMap<String, bool>,
}

impl<'a> Places<'a> {
    fn new(bucket: &'a Bucket, folder: String, after: &str) -> Self {
        Self {
            bucket,
            folder,
            after: after.to_owned(),
            token: None,
            ended: false,
            early: BTreeMap::new(),
        }
    }

    /// The next places, sorted, all of them after those that were given before.
    async fn next(&mut self) -> Result<Option<Vec<String>>, BucketError> {
        if self.ended {
            return Ok(None);
        }
        let from = match &self.token {
            Some(token) => Some(From::Token(token)),
            None if self.after.is_empty() => None,
            None => Some(From::After(&self.after)),
        };
        let listing = self.bucket.list(&self.folder, None, from).await?;
        self.token = listing.more;
        self.ended = self.token.is_none();
        let mut places = Vec::with_capacity(listing.folders.len() * 2);
        for name in &listing.folders {
            places.push(format!("{name}/"));
            if self.early.get(name) != Some(&true) {
                places.push(name.clone());
            }
        }
        if let Some(last) = listing.folders.last().filter(|_| !self.ended) {
            for start in starts(last) {
                if self.early.contains_key(start) || start <= self.after.as_str() {
                    continue;
                }
                let folder = format!("{}/{start}", self.folder);
                let there = self.bucket.is_folder(&folder).await?;
                self.early.insert(start.to_owned(), there);
                if there {
                    places.push(start.to_owned());
                }
            }
        }
        places.sort_unstable();
        Ok(Some(places))
    }
}

/// The names that are before `name`, and whose keys are after its key: what is before each `-` and
/// `.`.
fn starts(name: &str) -> impl Iterator<Item = &str> {
    let ends = name.match_indices(['-', '.']);
    ends.map(|(at, _)| &name[..at])
        .filter(|start| !start.is_empty())
}
