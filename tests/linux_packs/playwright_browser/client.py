"""Playwright's own client on the host, at a copy's Chromium: client.py CDP_URL PAGE_URL PICTURE. Prints one JSON
document: the tabs that were there, what the page said, and the cookies of its context. Writes a screenshot to
PICTURE."""

import json
import sys

from playwright.sync_api import sync_playwright

cdp, url, picture = sys.argv[1:]
with sync_playwright() as playwright:
    # Where KVM emulates the guest's kernel, anything may take minutes.
    browser = playwright.chromium.connect_over_cdp(cdp, timeout=0)
    there = [page.url for context in browser.contexts for page in context.pages]
    context = browser.new_context(viewport={"width": 320, "height": 240}, device_scale_factor=1)
    context.set_default_timeout(0)
    page = context.new_page()
    page.goto(url)
    before = context.cookies()
    page.fill("#name", "forkd")
    page.click("#send")
    greeting = page.evaluate("document.querySelector('#greeting').textContent")
    page.evaluate("document.cookie = 'who=host'")
    page.locator("#send").blur()
    page.mouse.move(310, 230)
    page.screenshot(path=picture)
    cookies = [f"{cookie['name']}={cookie['value']}" for cookie in context.cookies()]
    context.close()
    print(json.dumps({"there": there, "before": before, "greeting": greeting, "cookies": cookies}))
    browser.close()
