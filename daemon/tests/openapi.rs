//! docs/openapi.json is what the code says. `FORKD_GOLDEN=write` writes it anew.

use std::path::Path;

#[test]
fn the_document_in_docs_is_current() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    let document = forkd_daemon::api::router::document();
    if std::env::var_os("FORKD_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(&file, &document).unwrap();
    }
    let kept = std::fs::read_to_string(&file).unwrap();
    assert!(kept == document, "{} is not current: FORKD_GOLDEN=write writes it anew", file.display());
}

#[test]
fn every_path_has_its_failures_and_a_description() {
    let document: serde_json::Value = serde_json::from_str(&forkd_daemon::api::router::document()).unwrap();
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() > 15, "{} paths", paths.len());
    for (path, methods) in paths {
        for (method, operation) in methods.as_object().unwrap() {
            let described = operation["summary"].is_string() || operation["description"].is_string();
            assert!(described, "{method} {path} is not described");
            if path.contains("{id}") {
                assert!(operation["responses"]["404"].is_object(), "{method} {path} does not say 404");
            }
        }
    }
}
