//! `recipes/playwright-browser`, driven by Playwright's own clients: npm's in the copies, PyPI's on the host.

use super::copies::Copies;
use super::harness::distinct;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

const COPIES: usize = 5;
/// Of a thousand pixels, how many may differ: another version of Chromium draws letters differently.
const DIFFERENT_MAX: u32 = 5;

/// A file beside this one.
fn beside(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/linux_packs/playwright_browser").join(name)
}

/// Playwright's Python client and Pillow, fetched once.
fn packages() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("playwright-client");
    if !target.exists() {
        let staged = target.with_extension(std::process::id().to_string());
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "install", "--quiet", "--require-hashes", "--only-binary=:all:", "--target"]);
        pip.arg(&staged).arg("--requirement").arg(beside("requirements.txt"));
        assert!(pip.status().unwrap().success(), "{pip:?} failed");
        // Another test may have been as fast.
        if fs::rename(&staged, &target).is_err() {
            fs::remove_dir_all(&staged).unwrap();
        }
    }
    target
}

/// What one of the Python programs beside this file prints.
fn python(program: &str, arguments: &[&str]) -> String {
    let mut python = Command::new("python3");
    python.env("PYTHONPATH", packages()).arg(beside(program)).args(arguments);
    let output = python.output().unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(output.status.success(), "{program} {arguments:?}: {stdout}{stderr}");
    stdout
}

/// How many of a thousand pixels are not those of the picture that is expected.
fn different(picture: &Path) -> u32 {
    let expected = beside("expected.png");
    let printed = python("compare.py", &[expected.to_str().unwrap(), picture.to_str().unwrap()]);
    printed.trim().parse().unwrap()
}

/// What code prints in a copy, which is JSON.
fn printed(copies: &Copies, at: usize, code: &str) -> Value {
    let said = copies.json(&["eval", copies.id(at), code]);
    let output = said["output"].as_str().unwrap_or_else(|| panic!("{code}: {said}"));
    serde_json::from_str(output).unwrap_or_else(|error| panic!("{error}: {output}"))
}

/// The same of an expression, whose value is printed.
fn value(copies: &Copies, at: usize, expression: &str) -> Value {
    printed(copies, at, &format!("console.log(JSON.stringify({expression}))"))
}

/// What a copy runs first: a server of the page, which says what cookies it was sent.
fn serve() -> String {
    let page = serde_json::to_string(&fs::read_to_string(beside("page.html")).unwrap()).unwrap();
    format!(
        "const sent = [];
        const server = require('http').createServer((request, response) => {{
            if (request.url === '/') sent.push(request.headers.cookie || '');
            response.setHeader('content-type', 'text/html');
            response.end({page});
        }});
        await new Promise((resolve) => server.listen(8000, '127.0.0.1', resolve));"
    )
}

/// The flow that every user of Playwright knows, in a copy of the number `WHO`.
const FLOW: &str = "
    const mine = await browser.newContext({ viewport: { width: 320, height: 240 }, deviceScaleFactor: 1 });
    mine.setDefaultTimeout(0);
    const tab = await mine.newPage();
    await tab.goto('http://127.0.0.1:8000/');
    const empty = await tab.screenshot();
    await tab.fill('#name', 'forkd');
    await tab.click('#send');
    const greeting = await tab.evaluate(() => document.querySelector('#greeting').textContent);
    await tab.locator('#send').blur();
    await tab.mouse.move(310, 230);
    const full = await tab.screenshot();
    await tab.evaluate('document.cookie = \"who=WHO\"');
    await tab.reload();
    console.log(JSON.stringify({
        greeting,
        sent,
        cookies: (await mine.cookies()).map(({ name, value }) => `${name}=${value}`),
        pictures: [empty, full].map((picture) => picture.toString('base64')),
    }))";

/// What no two copies may have in common.
const DRAWN: [&str; 7] = [
    "await page.evaluate('Math.random()')",
    "await page.evaluate('crypto.getRandomValues(new Uint32Array(4)).join()')",
    "await tab.evaluate('Math.random()')",
    "await tab.evaluate('crypto.getRandomValues(new Uint32Array(4)).join()')",
    "await tab.evaluate('crypto.randomUUID()')",
    "await tab.evaluate('performance.timeOrigin')",
    "Math.random()",
];

/// Writes a picture of a flow to a file.
fn picture(said: &Value, at: usize, path: &Path) {
    let coded = said["pictures"][at].as_str().unwrap();
    let code = "import base64, sys; sys.stdout.buffer.write(base64.b64decode(sys.argv[1]))";
    let decoded = Command::new("python3").args(["-c", code, coded]).output().unwrap();
    fs::write(path, decoded.stdout).unwrap();
}

/// One copy does all that is asked of it; its cookies are its own.
fn flow(copies: &Copies, at: usize) {
    let who = format!("copy-{at}");
    copies.eval(at, &serve());
    let said = printed(copies, at, &FLOW.replace("WHO", &who));
    assert_eq!(said["greeting"], "Hello forkd");
    let own = format!("who={who}");
    assert_eq!(said["sent"], serde_json::json!(["", own]));
    assert_eq!(said["cookies"], serde_json::json!([own]));
    let paths = [0, 1].map(|which| {
        let path = copies.bed.path(&format!("{who}-{which}.png"));
        picture(&said, which, &path);
        path
    });
    let [empty, full] = paths.each_ref().map(|path| different(path));
    assert!(full <= DIFFERENT_MAX, "{who}: {full} of a thousand pixels are others");
    assert!(empty > 10 * DIFFERENT_MAX, "the comparison sees no difference");
}

#[test]
fn five_browsers_fill_a_form_and_none_sees_anothers_cookies() {
    packages();
    let copies = Copies::of("playwright-browser", &["-n", &COPIES.to_string()]);
    // The tab that was open before the snapshot: the same moment in all of them, and nothing else is open.
    let open = |at| value(&copies, at, "[page.url(), browser.contexts().length, context.pages().length]");
    let opened = |at| value(&copies, at, "await page.evaluate('performance.timeOrigin')");
    for at in 0..COPIES {
        assert_eq!(open(at), serde_json::json!(["about:blank", 1, 1]));
        assert_eq!(opened(at), opened(0));
    }
    thread::scope(|scope| {
        for at in 0..COPIES {
            let copies = &copies;
            scope.spawn(move || flow(copies, at));
        }
    });
    for expression in DRAWN {
        let drawn: Vec<Value> = (0..COPIES).map(|at| value(&copies, at, expression)).collect();
        assert!(distinct(drawn.iter()), "{expression}: {drawn:?}");
    }
    // What is drawn in the open tab after it went elsewhere, too.
    let drawn: Vec<Value> = (0..COPIES)
        .map(|at| {
            copies.eval(at, "page.setDefaultTimeout(0); await page.goto('http://127.0.0.1:8000/')");
            value(&copies, at, "await page.evaluate('[Math.random(), document.cookie]')")
        })
        .collect();
    assert!(drawn.iter().all(|drawn| drawn[1] == ""), "another context's cookies: {drawn:?}");
    assert!(distinct(drawn.iter()), "{drawn:?}");
}

#[test]
fn a_hosts_playwright_drives_a_copys_chromium_through_a_forward() {
    packages();
    let copies = Copies::of("playwright-browser", &[]);
    copies.eval(0, &serve());
    let (mut forward, ports) = copies.forward(&[copies.id(0), "9222"]);
    let picture = copies.bed.path("host.png");
    let cdp = format!("http://127.0.0.1:{}", ports[0]);
    let said = python("client.py", &[&cdp, "http://127.0.0.1:8000/", picture.to_str().unwrap()]);
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["there"], serde_json::json!(["about:blank"]));
    assert_eq!(said["before"], serde_json::json!([]));
    assert_eq!(said["greeting"], "Hello forkd");
    assert_eq!(said["cookies"], serde_json::json!(["who=host"]));
    let different = different(&picture);
    assert!(different <= DIFFERENT_MAX, "{different} of a thousand pixels are others");
    // The worker's tab and the host's had nothing to do with each other.
    assert_eq!(
        value(&copies, 0, "[page.url(), await context.cookies()]"),
        serde_json::json!(["about:blank", []])
    );
    copies.kill();
    forward.wait().unwrap();
}
