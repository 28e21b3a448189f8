// Does once before the snapshot what a copy does first: a new context and a new tab, a page from a server, a form, a
// picture; and the same in the tab that is open, which is blank again afterwards.

'use strict';

const http = require('node:http');

const PAGE = '<!doctype html><title>rehearsal</title><h1>Rehearsal</h1><input id="word"><button id="go">Go</button>';

// A limit that suits a person's machine is none for one whose kernel is emulated.
const UNLIMITED = { timeout: 0 };

async function use(page, url) {
  await page.goto(url, UNLIMITED);
  await page.fill('#word', 'word', UNLIMITED);
  await page.click('#go', UNLIMITED);
  await page.evaluate(() => document.title);
  await page.screenshot(UNLIMITED);
}

async function timed(what, run) {
  const begun = Date.now();
  const value = await run();
  // To the console, for `forkd logs --tag`.
  process.stderr.write(`rehearsal: ${what}: ${Date.now() - begun} ms\n`);
  return value;
}

module.exports = async function rehearse(browser, tab) {
  const server = http.createServer((request, response) => {
    response.setHeader('content-type', 'text/html');
    response.setHeader('set-cookie', 'rehearsed=yes');
    response.end(PAGE);
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  const url = `http://127.0.0.1:${server.address().port}/`;
  const context = await timed('a new context', () => browser.newContext());
  const page = await timed('a new page', () => context.newPage());
  await timed('goto, fill, click, evaluate and screenshot', () => use(page, url));
  await timed('closing', () => context.close());
  await timed('the same in the open tab', () => use(tab, url));
  await tab.context().clearCookies();
  await tab.goto('about:blank');
  server.closeAllConnections();
  await new Promise((resolve) => server.close(resolve));
};
