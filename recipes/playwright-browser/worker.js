// Warm worker: Playwright with a Chromium that it has started and a tab that is open. The protocol is in
// /forkd/workers/forkd_worker.js.

'use strict';

const playwright = require('playwright');
const forkd = require('/forkd/workers/forkd_worker.js');

const CHROMIUM = '/usr/lib/chromium/chromium-headless-shell';

// Playwright's own switches come before these.
const SWITCHES = [
  // A client on the host reaches this port through `forkd forward`.
  '--remote-debugging-port=9222',
  // No process for a GPU that is not there.
  '--disable-gpu',
  '--in-process-gpu',
];

// V8 seeds a tab's Math.random from numbers that were drawn before the snapshot, so every copy would get the same ones.
// This one draws on the kernel's generator, through crypto. A tab of a new context has a process of its own, and needs
// it not.
function drawAnew() {
  const words = new Uint32Array(2);
  Math.random = function random() {
    crypto.getRandomValues(words);
    return ((words[0] >>> 5) * 67108864 + (words[1] >>> 6)) / 9007199254740992;
  };
}

async function main() {
  const { chromium } = playwright;
  const browser = await chromium.launch({
    executablePath: CHROMIUM,
    args: SWITCHES,
    // No limit: the recipe's readiness has one.
    timeout: 0,
    // SIGINT ends the code that runs, not the browser.
    handleSIGINT: false,
  });
  const context = await browser.newContext();
  await context.addInitScript(drawAnew);
  const page = await context.newPage();
  await page.evaluate(drawAnew);
  await forkd.serve({ require, names: { playwright, chromium, browser, context, page } });
}

main().catch((error) => {
  process.stderr.write(`${error.stack}\n`);
  process.exit(1);
});
