//! Who learns who we are: the hosts the user named, and no one else.

use forkd_fs::source::{Credentials, HttpClient, HttpError, HttpOptions, Priority, SourceError};

mod support;
use support::server::{Fault, Server};
use support::{http_options, noise, source};

const TOKEN: &str = "Bearer hush";
/// `me:hush`
const BASIC: &str = "Basic bWU6aHVzaA==";

fn client(credentials: Credentials) -> HttpClient {
    HttpClient::new(HttpOptions { credentials, ..http_options() })
}

fn with_token() -> HttpClient {
    client(Credentials::default().with_token("hush"))
}

fn authorizations(server: &Server) -> Vec<Option<String>> {
    server.requests().into_iter().map(|request| request.authorization).collect()
}

#[tokio::test]
async fn a_named_host_gets_the_token_and_another_port_does_not() {
    let (hub, other) = (Server::start(noise(1, 1000)).await, Server::start(noise(2, 1000)).await);
    hub.require(TOKEN);
    let http = with_token();
    assert!(
        matches!(http.get(&hub.url(), 2000).await, Err(HttpError::Denied { status: 401, .. })),
        "not named yet"
    );
    http.authorize(&hub.url());
    http.get(&hub.url(), 2000).await.unwrap();
    // A pack the hub has itself, and one it points at elsewhere.
    for (server, expected) in [(&hub, Some(TOKEN)), (&other, None)] {
        source(&http, &server.url(), None).read_at(0, 10, Priority::Demand).await.unwrap();
        assert_eq!(authorizations(server).last().unwrap().as_deref(), expected);
    }
}

#[tokio::test]
async fn connections_opened_ahead_say_who_we_are_to_a_named_host_only() {
    let (hub, other) = (Server::start(noise(1, 1000)).await, Server::start(noise(2, 1000)).await);
    let http = with_token();
    http.authorize(&hub.url());
    for (server, expected) in [(&hub, Some(TOKEN)), (&other, None)] {
        http.preconnect(&server.url());
        while server.request_count() == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        assert_eq!(authorizations(server), [expected.map(str::to_owned)]);
    }
}

#[tokio::test]
async fn a_redirect_takes_no_credentials_along() {
    let (hub, other) = (Server::start(noise(1, 1000)).await, Server::start(noise(2, 1000)).await);
    let http = with_token();
    http.authorize(&hub.url());
    // Even though the user named that host too: the hub must not choose what is asked there in the user's name.
    http.authorize(&other.url());
    hub.fail_always(Fault::Redirect(other.url()));
    http.get(&hub.url(), 2000).await.unwrap();
    let source = source(&http, &hub.url(), None);
    for _ in 0..2 {
        source.read_at(0, 10, Priority::Demand).await.unwrap();
    }
    assert!(authorizations(&hub).iter().all(|sent| sent.as_deref() == Some(TOKEN)));
    assert_eq!(authorizations(&other), [None, None, None]);
    // Away and back again is not home.
    hub.fail_always(Fault::Fine);
    hub.fail_next([Fault::Redirect(other.url())]);
    other.fail_next([Fault::Redirect(format!("{}?second", hub.url()))]);
    http.get(&hub.url(), 2000).await.unwrap();
    assert_eq!(authorizations(&hub).last().unwrap().as_deref(), None);
}

#[tokio::test]
async fn a_redirect_within_the_host_keeps_them() {
    let hub = Server::start(noise(1, 1000)).await;
    hub.require(TOKEN);
    let http = with_token();
    http.authorize(&hub.url());
    hub.fail_next([Fault::Redirect("/elsewhere".into())]);
    http.get(&hub.url(), 2000).await.unwrap();
}

#[tokio::test]
async fn user_and_password_in_the_url_work_and_are_never_shown() {
    let hub = Server::start(noise(1, 1000)).await;
    hub.require(BASIC);
    let url = hub.url().replace("http://", "http://me:hush@");
    let http = client(Credentials::default());
    let read = source(&http, &url, None);
    read.read_at(0, 10, Priority::Demand).await.unwrap();
    http.get(&url, 2000).await.unwrap();
    assert_eq!(read.describe(), hub.url());
    hub.require("Basic other");
    let failed = read.read_at(0, 10, Priority::Demand).await.unwrap_err();
    assert!(matches!(failed, SourceError::Http(HttpError::Denied { .. })));
    let document = http.get(&url, 2000).await.unwrap_err();
    let mistyped = http.get(&url.replace("http:", "htp:"), 2000).await.unwrap_err();
    let shown =
        format!("{failed} {failed:?} {document} {document:?} {mistyped} {mistyped:?} {read:?} {http:?}");
    assert!(!shown.contains("hush") && !shown.contains(BASIC), "{shown}");
    // A pack the registry names without them, on the same host.
    hub.require(BASIC);
    http.authorize(&url);
    source(&http, &hub.url(), None).read_at(0, 10, Priority::Demand).await.unwrap();
}

#[tokio::test]
async fn a_netrc_entry_is_used_for_its_host() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("netrc");
    std::fs::write(
        &file,
        "machine elsewhere login you password x\nmachine 127.0.0.1\n login me\n password hush\n",
    )
    .unwrap();
    let hub = Server::start(noise(1, 1000)).await;
    hub.require(BASIC);
    let http = client(Credentials::default().with_netrc(file));
    http.authorize(&hub.url());
    http.get(&hub.url(), 2000).await.unwrap();
    let stranger = Server::start(noise(1, 1000)).await;
    http.get(&stranger.url(), 2000).await.unwrap();
    assert_eq!(authorizations(&stranger), [None], "the same machine, but another port nobody named");
}
