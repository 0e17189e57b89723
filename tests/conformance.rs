//! What distribution-spec 1.1 says that a registry MUST and SHOULD do, line by line, and the test
//! that shows each of it. A test that is named here and does not exist fails this one.
//!
//! What is asked of clients is not here. What only official tests of the strict kind ask, beyond the
//! specification, is at the end.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// The section, what it says, and the tests that show it, by file and name.
const TABLE: &[(&str, &str, &[&str])] = &[
    // Pull.
    (
        "Pulling manifests",
        "<name> MUST match the regular expression",
        &["refusals::what_is_no_name_tag_or_digest_never_reaches_the_upstream"],
    ),
    (
        "Pulling manifests",
        "<reference> MUST be either the digest of the manifest or a tag",
        &["hosted::a_manifest_is_pushed_by_tag_and_by_digest"],
    ),
    (
        "Pulling manifests",
        "<reference> as a tag MUST be at most 128 characters and match the regular expression",
        &["refusals::what_is_no_name_tag_or_digest_never_reaches_the_upstream"],
    ),
    (
        "Pulling manifests",
        "a GET of an existing manifest MUST be answered 200 OK with its digest's content",
        &["hosted::a_manifest_is_pushed_by_tag_and_by_digest"],
    ),
    (
        "Pulling manifests",
        "the response's Content-Type SHOULD be the type it was pushed with",
        &[
            "hosted::what_is_no_manifest_is_refused_and_any_media_type_is_taken",
            "hosted::a_manifest_is_pushed_by_tag_and_by_digest",
        ],
    ),
    (
        "Pulling manifests",
        "a manifest that is not found MUST be answered 404 Not Found",
        &["hosted::a_manifest_is_pushed_by_tag_and_by_digest"],
    ),
    (
        "Pulling manifests",
        "Docker-Content-Digest, where it is sent, MUST be the digest of the body",
        &["hosted::a_manifest_is_known_by_its_sha512_as_well"],
    ),
    (
        "Pulling blobs",
        "a GET of an existing blob MUST be answered 200 OK, with a digest that matches the body",
        &[
            "push::a_blob_is_pushed_by_one_post",
            "push::a_blob_is_pushed_in_chunks",
        ],
    ),
    (
        "Pulling blobs",
        "a blob that is not found MUST be answered 404 Not Found",
        &["push::what_is_not_what_its_digest_says_is_not_kept"],
    ),
    (
        "Pulling blobs",
        "a registry SHOULD support the Range request header as in RFC 9110",
        &[
            "hosted::ranges_of_a_hosted_blob_are_served",
            "mirror::a_blob_is_served_in_ranges_cold_and_warm",
        ],
    ),
    (
        "Checking if content exists",
        "a HEAD of an existing blob or manifest MUST be answered 200 OK",
        &[
            "hosted::a_manifest_is_pushed_by_tag_and_by_digest",
            "push::a_blob_is_pushed_by_one_post",
        ],
    ),
    (
        "Checking if content exists",
        "a HEAD's answer SHOULD have the digest in Docker-Content-Digest",
        &[
            "hosted::a_manifest_is_pushed_by_tag_and_by_digest",
            "push::a_blob_is_pushed_by_one_post",
        ],
    ),
    (
        "Checking if content exists",
        "a HEAD's answer SHOULD have the size in Content-Length",
        &[
            "hosted::a_manifest_is_pushed_by_tag_and_by_digest",
            "push::a_blob_is_pushed_by_one_post",
        ],
    ),
    (
        "Checking if content exists",
        "a HEAD of what is not found MUST be answered 404 Not Found",
        &[
            "hosted::what_is_deleted_is_gone_at_once",
            "hosted::hosted_names_are_never_asked_of_an_upstream",
        ],
    ),
    // Push.
    (
        "Push",
        "a manifest whose subject does not exist MUST be accepted",
        &["hosted::referrers_are_listed_with_their_types_and_annotations"],
    ),
    (
        "Push",
        "a manifest that is refused for what it refers to MUST be answered with MANIFEST_BLOB_UNKNOWN errors",
        &["hosted::what_is_no_manifest_is_refused_and_any_media_type_is_taken"],
    ),
    (
        "POST then PUT",
        "the POST MUST be answered 202 Accepted with a Location",
        &[
            "push::a_blob_is_pushed_in_chunks",
            "push::an_upload_is_hashed_as_its_digest_is_whatever_was_said_before",
        ],
    ),
    (
        "POST then PUT",
        "the Location MUST contain a unique session ID",
        &["push::uploads_that_were_given_up_are_removed_at_the_start"],
    ),
    (
        "POST then PUT",
        "the PUT MUST be answered 201 Created with the Location of the blob",
        &["push::a_blob_is_pushed_in_chunks"],
    ),
    (
        "Single POST",
        "Content-Length MUST match the content, and <digest> its digest",
        &["push::what_is_not_what_its_digest_says_is_not_kept"],
    ),
    (
        "Single POST",
        "the POST MUST be answered 201 Created with the Location of the blob",
        &["push::a_blob_is_pushed_by_one_post"],
    ),
    (
        "Pushing a blob in chunks",
        "a chunk MUST be answered 202 Accepted with Location and Range",
        &["push::a_blob_is_pushed_in_chunks"],
    ),
    (
        "Pushing a blob in chunks",
        "Content-Range MUST be inclusive, begin with 0, and match ^[0-9]+-[0-9]+$",
        &[
            "push::of_a_chunk_that_is_not_as_long_as_it_says_nothing_is_kept",
            "push::a_chunk_out_of_order_is_told_where_to_go_on",
        ],
    ),
    (
        "Pushing a blob in chunks",
        "a chunk out of order MUST be answered 416 Requested Range Not Satisfiable",
        &["push::a_chunk_out_of_order_is_told_where_to_go_on"],
    ),
    (
        "Pushing a blob in chunks",
        "the session MUST be closed by a PUT, with or without the last chunk",
        &[
            "push::a_blob_is_pushed_in_chunks",
            "push::a_blob_of_unknown_length_is_streamed",
        ],
    ),
    (
        "Pushing a blob in chunks",
        "the closing PUT MUST include the digest of the whole blob",
        &["push::what_is_not_what_its_digest_says_is_not_kept"],
    ),
    (
        "Pushing a blob in chunks",
        "the closing PUT MUST be answered 201 Created with the Location of the blob",
        &["push::a_blob_is_pushed_in_chunks"],
    ),
    (
        "Pushing a blob in chunks",
        "a GET of an active upload MUST be answered 204 No Content with Location and Range",
        &[
            "push::a_blob_is_pushed_in_chunks",
            "push::an_upload_goes_on_where_its_connection_broke_and_after_a_restart",
        ],
    ),
    (
        "Cancel a blob upload",
        "a DELETE of an upload SHOULD be answered 204 No Content",
        &["push::an_upload_is_cancelled_also_while_it_runs"],
    ),
    (
        "Cancel a blob upload",
        "unfinished uploads SHOULD eventually time out",
        &["push::uploads_that_were_given_up_are_removed_at_the_start"],
    ),
    (
        "Mounting a blob",
        "a mount MUST be answered 201 Created with the Location of the blob",
        &["hosted::a_blob_is_mounted_from_hosted_names_alone"],
    ),
    (
        "Mounting a blob",
        "what can't be mounted SHOULD be answered 202 with an upload",
        &["hosted::a_blob_is_mounted_from_hosted_names_alone"],
    ),
    (
        "Pushing manifests",
        "parameters of Content-Type SHOULD be ignored",
        &["hosted::parameters_of_a_content_type_are_ignored"],
    ),
    (
        "Pushing manifests",
        "the registry MUST store the manifest in the exact bytes that came",
        &[
            "hosted::a_manifest_is_pushed_by_tag_and_by_digest",
            "push::a_pushed_image_is_pulled_and_laid_out_as_distribution_has_it",
        ],
    ),
    (
        "Pushing manifests",
        "a push MUST be answered 201 Created with the Location of the manifest",
        &["hosted::a_manifest_is_pushed_by_tag_and_by_digest"],
    ),
    (
        "Pushing manifests",
        "Docker-Content-Digest MUST be the digest of what was uploaded",
        &["hosted::a_manifest_is_pushed_by_tag_and_by_digest"],
    ),
    (
        "Pushing manifests",
        "a pull of a repository that does not exist MUST be answered 404 Not Found",
        &["hosted::a_manifest_is_pushed_by_tag_and_by_digest"],
    ),
    (
        "Pushing manifests",
        "a registry SHOULD have a limit for manifests, answered 413 Payload Too Large, of at least 4 MiB",
        &["hosted::a_manifest_has_4_mib_at_the_most"],
    ),
    (
        "Pushing manifests with subject",
        "the answer MUST have the subject in OCI-Subject",
        &["hosted::referrers_are_listed_with_their_types_and_annotations"],
    ),
    // Content discovery.
    (
        "Listing tags",
        "the list of a repository that exists MUST be answered 200 OK",
        &["hosted::tags_are_listed_in_order_a_page_at_a_time"],
    ),
    (
        "Listing tags",
        "the tags MUST be in lexical order",
        &["hosted::tags_are_listed_in_order_a_page_at_a_time"],
    ),
    (
        "Listing tags",
        "the answer MUST be JSON with name and tags",
        &["hosted::tags_are_listed_in_order_a_page_at_a_time"],
    ),
    (
        "Listing tags",
        "fewer than n MUST be all there are, or come with a Link of rel=next",
        &["hosted::tags_are_listed_in_order_a_page_at_a_time"],
    ),
    (
        "Listing tags",
        "n=0 MUST be answered by an empty list without a Link",
        &["hosted::tags_are_listed_in_order_a_page_at_a_time"],
    ),
    (
        "Listing tags",
        "last MUST be a tag, not an index, and is not in the list",
        &["hosted::tags_are_listed_in_order_a_page_at_a_time"],
    ),
    (
        "Listing referrers",
        "a repository that exists MUST be answered 200 OK, and 404 MUST NOT be",
        &["hosted::referrers_are_listed_with_their_types_and_annotations"],
    ),
    (
        "Listing referrers",
        "an invalid digest MUST be answered 400 Bad Request",
        &["hosted::referrers_are_listed_with_their_types_and_annotations"],
    ),
    (
        "Listing referrers",
        "the answer MUST be an OCI index with that Content-Type",
        &["hosted::referrers_are_listed_with_their_types_and_annotations"],
    ),
    (
        "Listing referrers",
        "each descriptor MUST have the artifactType, or the type of the config",
        &["hosted::referrers_are_listed_with_their_types_and_annotations"],
    ),
    (
        "Listing referrers",
        "the artifactType of an index without one MUST be omitted",
        &["src/oci/pushed.rs::an_index_without_a_type_of_its_own_has_none_as_a_referrer"],
    ),
    (
        "Listing referrers",
        "each descriptor MUST have all annotations",
        &["hosted::referrers_are_listed_with_their_types_and_annotations"],
    ),
    (
        "Listing referrers",
        "without any the list of manifests MUST be empty",
        &["hosted::referrers_are_listed_with_their_types_and_annotations"],
    ),
    (
        "Listing referrers",
        "what does not fit one answer MUST have a Link of rel=next",
        &["hosted::many_referrers_come_in_pages"],
    ),
    (
        "Listing referrers",
        "a registry SHOULD filter by artifactType, and MUST say so in OCI-Filters-Applied",
        &["hosted::referrers_are_listed_with_their_types_and_annotations"],
    ),
    (
        "Enabling the referrers API",
        "manifests that are listed under the fallback tag MUST be included",
        &["hosted::the_fallback_tags_entries_are_merged"],
    ),
    (
        "Enabling the referrers API",
        "all manifests that are pushed with a subject MUST be included",
        &["hosted::referrers_are_listed_with_their_types_and_annotations"],
    ),
    // Content management.
    (
        "Deleting tags",
        "a delete MUST be answered 202 Accepted",
        &["hosted::what_is_deleted_is_gone_at_once"],
    ),
    (
        "Deleting tags",
        "where it is disabled, it MUST be answered 400 or 405",
        &["hosted::a_delete_is_refused_unless_it_is_allowed"],
    ),
    (
        "Deleting manifests",
        "a delete MUST be answered 202 Accepted",
        &["hosted::what_is_deleted_is_gone_at_once"],
    ),
    (
        "Deleting manifests",
        "of a repository that does not exist it MUST be answered 404 Not Found",
        &["hosted::what_is_deleted_is_gone_at_once"],
    ),
    (
        "Deleting manifests",
        "where it is disabled, it MUST be answered 400 or 405",
        &["hosted::a_delete_is_refused_unless_it_is_allowed"],
    ),
    (
        "Deleting blobs",
        "a delete MUST be answered 202 Accepted",
        &["hosted::what_is_deleted_is_gone_at_once"],
    ),
    (
        "Deleting blobs",
        "of a blob that is not found it MUST be answered 404 Not Found",
        &["hosted::what_is_deleted_is_gone_at_once"],
    ),
    (
        "Deleting blobs",
        "where it is disabled, it MUST be answered 400 or 405",
        &["hosted::a_delete_is_refused_unless_it_is_allowed"],
    ),
    (
        "Registry proxying",
        "a registry that uses ns SHOULD say it again in OCI-Namespace",
        &["hosted::the_registry_that_was_meant_is_said_again"],
    ),
    // The API.
    (
        "Determining support",
        "GET /v2/ is answered 200 OK",
        &[
            "mirror::the_base_of_the_api_and_the_root_answer_without_the_upstream",
            "auth::the_base_asks_under_its_own_name_alone",
        ],
    ),
    (
        "Error codes",
        "an error body in JSON MUST have the form of errors with code, message and detail",
        &["hosted::what_is_no_manifest_is_refused_and_any_media_type_is_taken"],
    ),
    (
        "Error codes",
        "each code MUST be one of the table's",
        &["this::every_code_is_of_the_specification_or_of_distribution"],
    ),
    (
        "Warnings",
        "a Warning MUST have the code 299, the agent -, and no date",
        &["freshness::what_is_cached_is_served_with_a_warning_while_the_upstream_is_in_trouble"],
    ),
    // Beyond 1.1: what strict tests ask.
    (
        "strict",
        "Docker-Content-Digest on every answer about a blob or a manifest",
        &[
            "push::a_blob_is_pushed_by_one_post",
            "hosted::a_manifest_is_pushed_by_tag_and_by_digest",
        ],
    ),
    (
        "strict",
        "an upload under way can be cancelled",
        &["push::an_upload_is_cancelled_also_while_it_runs"],
    ),
    (
        "strict",
        "tag=, many times, on a push by digest, with OCI-Tag",
        &["hosted::a_manifest_is_known_by_its_sha512_as_well"],
    ),
    (
        "strict",
        "digest-algorithm on a POST",
        &["push::an_upload_is_hashed_as_its_digest_is_whatever_was_said_before"],
    ),
    (
        "strict",
        "a mount without from",
        &["hosted::a_blob_is_mounted_from_hosted_names_alone"],
    ),
    (
        "strict",
        "what is deleted is gone when the answer comes, with the tags of a manifest",
        &["hosted::what_is_deleted_is_gone_at_once"],
    ),
    (
        "strict",
        "manifests are JSON objects of the type they are sent as, with valid descriptors",
        &["hosted::what_is_no_manifest_is_refused_and_any_media_type_is_taken"],
    ),
    (
        "strict",
        "manifests that lack layers or platforms, where that is configured",
        &["hosted::what_may_be_missing_is_configured"],
    ),
    (
        "strict",
        "blobs of no bytes, and of sha512",
        &["push::a_blob_is_pushed_by_one_post"],
    ),
    (
        "strict",
        "a range that ends before it begins is answered 416",
        &["hosted::ranges_of_a_hosted_blob_are_served"],
    ),
];

/// The names of the tests in a file.
fn tests_in(file: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{file}: {error}"));
    let mut names = Vec::new();
    let (mut is_test, mut is_list) = (false, false);
    for line in text.lines().map(str::trim) {
        // Functions of which tests are made: `on_each_home!`, and `on_the_disk_alone!`.
        if is_list {
            is_list = line != "}";
            let name = line.trim_end_matches(',');
            let name = name.split_once(':').map_or(name, |(name, _)| name);
            names.push(name.to_owned());
            continue;
        }
        is_list = line.starts_with("on_") && line.ends_with("! {");
        match line
            .strip_prefix("fn ")
            .and_then(|rest| rest.split('(').next())
        {
            Some(name) if is_test => {
                names.push(name.to_owned());
                is_test = false;
            }
            Some(_) => is_test = false,
            None if line == "#[test]" => is_test = true,
            None => {}
        }
    }
    names
}

#[test]
fn every_requirement_has_tests_that_exist() {
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut missing = Vec::new();
    assert!(TABLE.len() > 60, "requirements were lost");
    for (section, requirement, tests) in TABLE {
        assert!(!tests.is_empty(), "{section}: {requirement}");
        for test in *tests {
            let (file, name) = test.rsplit_once("::").expect("file::name");
            let file = match file {
                "this" => "tests/conformance.rs".to_owned(),
                source if source.starts_with("src/") => source.to_owned(),
                test => format!("tests/{test}.rs"),
            };
            let names = files.entry(file.clone()).or_insert_with(|| tests_in(&file));
            if !names.iter().any(|it| it == name) {
                missing.push(format!("{test}: {section}: {requirement}"));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn every_code_is_of_the_specification_or_of_distribution() {
    // "Error codes", and two of distribution's that clients know.
    let known = "BLOB_UNKNOWN BLOB_UPLOAD_INVALID BLOB_UPLOAD_UNKNOWN DIGEST_INVALID \
                 MANIFEST_BLOB_UNKNOWN MANIFEST_INVALID MANIFEST_UNKNOWN NAME_INVALID NAME_UNKNOWN \
                 SIZE_INVALID UNAUTHORIZED DENIED UNSUPPORTED TOOMANYREQUESTS \
                 PAGINATION_NUMBER_INVALID UNAVAILABLE";
    let known: Vec<&str> = known.split(' ').collect();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/oci/error.rs");
    let text = fs::read_to_string(source).expect("the codes");
    let codes = text
        .split("pub enum ErrorCode {")
        .nth(1)
        .and_then(|it| it.split('}').next());
    let mut found = 0;
    for line in codes.expect("the codes").lines().map(str::trim) {
        let Some(name) = line.strip_suffix(',').filter(|name| !name.starts_with('/')) else {
            continue;
        };
        let mut code = String::new();
        for (at, letter) in name.char_indices() {
            if letter.is_uppercase() && at > 0 {
                code.push('_');
            }
            code.extend(letter.to_uppercase());
        }
        assert!(known.contains(&code.as_str()), "{code}");
        found += 1;
    }
    assert!(found > 10, "only {found} codes");
}
