//! Tests of `registry`.

use forkd_fs::store::PackSource;

use super::*;
use crate::reference::{LATEST, PackageName, Reference};
use proptest::prelude::*;
use std::path::Path;

fn catalogue(address: HubAddress, json: &str) -> Catalogue {
    let registry = Registry::parse(json.as_bytes(), "test").unwrap();
    Catalogue { registry, address }
}

fn web() -> HubAddress {
    HubAddress::parse("http://127.0.0.1:1/hub/").unwrap()
}

const SAMPLE: &str = r#"{
    "schema_version": 1, "generated_by": "someone",
    "packages": {
        "deeplethe/python-numpy": {
            "description": "numpy", "stars": 5,
            "versions": {
                "latest": { "url": "a-v1.forkd-snapshot.tar.zst", "sha256": "", "size_bytes": 7, "later": [1] },
                "v1": { "url": "https://elsewhere.invalid/x.tar.zst", "index_offset": 5, "index_size": 6,
                        "index_sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" },
                "half": { "url": "x", "index_offset": 5 },
                "local": { "url": "file:///etc/passwd" },
                "later": { "recipe_path": "recipes/python-numpy" },
                "../up": { "url": "x" }
            }
        },
        "no-slash": { "versions": { "latest": { "url": "x" } } },
        "a/b/c": { "versions": { "latest": { "url": "x" } } }
    }
}"#;

fn resolve(address: HubAddress, reference: &str) -> Result<PackSource, RegistryError> {
    catalogue(address, SAMPLE).resolve(&reference.parse().unwrap()).map(|found| found.location.source)
}

#[test]
fn references_are_plain_names() {
    let reference: Reference = "deeplethe/python-numpy@v1".parse().unwrap();
    assert_eq!(
        (reference.package.to_string().as_str(), reference.version.as_str()),
        ("deeplethe/python-numpy", "v1")
    );
    assert_eq!("o/n".parse::<Reference>().unwrap().version, LATEST);
    for bad in [
        "",
        "n",
        "/n",
        "o/",
        "o/n@",
        "o/n/m",
        "../n",
        "o/..",
        "o/n@../v",
        "o/n@v@w",
        "o n/m",
        "/etc/passwd",
        "o/n\0",
    ] {
        assert!(bad.parse::<Reference>().is_err(), "{bad:?}");
    }
}

#[test]
fn hub_addresses_name_a_registry_or_its_folder() {
    let url = |text: &str| HubAddress::parse(text).unwrap().to_string();
    assert_eq!(url("http://h/"), "http://h/registry.json");
    assert_eq!(url("http://h"), "http://h/registry.json");
    assert_eq!(url("https://h/a/b"), "https://h/a/b/registry.json");
    assert_eq!(url("https://h/a/b/mine.json"), "https://h/a/b/mine.json");
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().display().to_string();
    assert_eq!(url(&folder), format!("{folder}/registry.json"));
    assert_eq!(url(&format!("file://{folder}")), format!("{folder}/registry.json"));
    for bad in ["ftp://h/", "http://", "file://host/x"] {
        assert!(matches!(HubAddress::parse(bad), Err(RegistryError::Address { .. })), "{bad}");
    }
}

#[test]
fn relative_urls_lead_beside_the_registry_and_pins_come_along() {
    assert_eq!(
        resolve(web(), "deeplethe/python-numpy").unwrap(),
        PackSource::Url("http://127.0.0.1:1/hub/a-v1.forkd-snapshot.tar.zst".into())
    );
    let local = HubAddress::Path("/srv/hub/registry.json".into());
    assert_eq!(
        resolve(local, "deeplethe/python-numpy").unwrap(),
        PackSource::Path("/srv/hub/a-v1.forkd-snapshot.tar.zst".into())
    );
    let pinned = catalogue(web(), SAMPLE).resolve(&"deeplethe/python-numpy@v1".parse().unwrap()).unwrap();
    assert_eq!(pinned.location.index.map(|pin| (pin.offset, pin.length)), Some((5, 6)));
}

#[test]
fn a_moving_version_is_known_by_one_that_stays() {
    let json = r#"{"schema_version": 1, "packages": {
        "a/url": {"versions": {"latest": {"url": "2"}, "v1": {"url": "1"}, "v2": {"url": "2"}}},
        "a/sum": {"versions": {"latest": {"url": "x", "sha256": "2"}, "v1": {"url": "1", "sha256": "1"},
                               "v2": {"url": "2", "sha256": "2"}}},
        "a/none": {"versions": {"latest": {"url": "3", "sha256": ""}, "v1": {"url": "1", "sha256": ""}}}
    }}"#;
    let catalogue = catalogue(web(), json);
    let settled = |name: &str| {
        let found = catalogue.resolve(&name.parse().unwrap()).unwrap();
        catalogue.settled(&found).to_string()
    };
    assert_eq!(settled("a/url"), "a/url@v2");
    assert_eq!(settled("a/sum"), "a/sum@v2");
    assert_eq!(settled("a/sum@v1"), "a/sum@v1");
    assert_eq!(settled("a/none"), "a/none@latest");
}

#[test]
fn a_registry_on_the_web_cannot_name_local_files() {
    assert!(matches!(resolve(web(), "deeplethe/python-numpy@local"), Err(RegistryError::Entry { .. })));
    let local = HubAddress::Path("/srv/registry.json".into());
    assert_eq!(
        resolve(local, "deeplethe/python-numpy@local").unwrap(),
        PackSource::Path("/etc/passwd".into())
    );
}

#[test]
fn half_a_pin_is_refused() {
    assert!(matches!(resolve(web(), "deeplethe/python-numpy@half"), Err(RegistryError::Entry { .. })));
}

#[test]
fn unknown_names_come_with_what_there_is() {
    match resolve(web(), "deeplethe/python-nunpy") {
        Err(RegistryError::UnknownPackage { near, .. }) => assert_eq!(near, ["deeplethe/python-numpy"]),
        other => panic!("{other:?}"),
    }
    match resolve(web(), "someone/python-numpy") {
        Err(RegistryError::UnknownPackage { near, .. }) => assert_eq!(near, ["deeplethe/python-numpy"]),
        other => panic!("{other:?}"),
    }
    match resolve(web(), "deeplethe/python-numpy@v9") {
        Err(RegistryError::UnknownVersion { versions, .. }) => assert!(versions.contains(&"v1".to_owned())),
        other => panic!("{other:?}"),
    }
}

#[test]
fn entries_leave_out_what_cannot_be_a_path() {
    let catalogue = catalogue(web(), SAMPLE);
    let names: Vec<_> = catalogue.entries().filter_map(Result::ok).map(|e| e.reference.to_string()).collect();
    assert_eq!(names, ["deeplethe/python-numpy@latest", "deeplethe/python-numpy@v1"]);
}

#[test]
fn what_is_hosted_nowhere_comes_with_its_recipe() {
    match resolve(web(), "deeplethe/python-numpy@later") {
        Err(RegistryError::NotHosted { recipe, .. }) => {
            assert_eq!(recipe.as_deref(), Some("recipes/python-numpy"))
        }
        other => panic!("{other:?}"),
    }
    let registry = Registry::parse(SAMPLE.as_bytes(), "test").unwrap();
    let entry = &registry.packages["deeplethe/python-numpy"].versions["later"];
    assert!(!serde_json::to_string(entry).unwrap().contains("url"));
}

#[test]
fn unknown_fields_survive_a_rewrite() {
    let registry = Registry::parse(SAMPLE.as_bytes(), "test").unwrap();
    let again = serde_json::to_string(&registry).unwrap();
    assert!(
        again.contains("\"generated_by\":\"someone\"")
            && again.contains("\"stars\":5")
            && again.contains("\"later\":[1]")
    );
    assert_eq!(Registry::parse(again.as_bytes(), "test").unwrap(), registry);
}

#[test]
fn other_documents_are_named_for_what_they_are() {
    assert!(matches!(Registry::parse(b"<html>", "x"), Err(RegistryError::Syntax { .. })));
    assert!(matches!(Registry::parse(b"{}", "x"), Err(RegistryError::Syntax { .. })));
    assert!(matches!(
        Registry::parse(br#"{"schema_version":2}"#, "x"),
        Err(RegistryError::Schema { found: 2, .. })
    ));
    let deep = "[".repeat(100_000);
    assert!(matches!(Registry::parse(deep.as_bytes(), "x"), Err(RegistryError::Syntax { .. })));
}

#[test]
fn the_projects_own_registry_is_valid() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(FILE_NAME);
    let registry = Registry::parse(&read_capped(&path).unwrap(), "registry.json").unwrap();
    for (name, package) in &registry.packages {
        assert!(name.parse::<PackageName>().is_ok(), "{name}");
        assert!(package.versions.contains_key(LATEST), "{name} has no latest");
        for recipe in package.versions.values().filter_map(|version| version.recipe_path.as_ref()) {
            assert!(path.with_file_name(recipe).join("recipe.toml").is_file(), "{name}: {recipe}");
        }
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Registry::parse(&bytes, "x");
    }

    #[test]
    fn every_accepted_reference_prints_back(text in "[a-z./@-]{1,20}") {
        if let Ok(reference) = text.parse::<Reference>() {
            prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
        }
    }
}
