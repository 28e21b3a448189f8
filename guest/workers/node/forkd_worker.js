// Warm workers in Node: require what should be warm, then `serve`.
//
//     const forkd = require('/forkd/workers/forkd_worker.js');
//     forkd.onCopy((seed, env) => { ... });
//     forkd.serve({ names: { _: require('lodash') }, require });
//
// The protocol is one line of JSON in, one line of JSON out; `serve` speaks it:
//
// In:  {"op":"eval","code":"..."}      statements; the value of the last expression is the answer, a promise's once it
//                                      is settled; `await` works at the top level
//      {"op":"resumed","seed":"hex","env":{...}}      this process is now a copy; no reply
// Out: {"ready":true}                  once
//      {"answer":...,"error":...,"output":...}    per eval: the value as util.inspect shows it, a stack, what was printed
//
// Names declared in one eval are there in the next. SIGINT ends the code that runs; between two evals it does nothing.

'use strict';

const crypto = require('crypto');
const fs = require('fs');
const net = require('net');
const repl = require('repl');
const readline = require('readline');
const util = require('util');
const { PassThrough, Writable } = require('stream');

// The agent takes no longer line.
const LINE_MAX = (1 << 20) - 1024;
const OUTPUT_MAX = 256 << 10;

const hooks = [];

// Has `hook(seed, env)` called in every copy before its first eval: a Buffer of 32 bytes that no other copy has, and the
// variables that the copy was given, which are in process.env by then.
function onCopy(hook) {
  hooks.push(hook);
}

// V8 seeds Math.random once, before the snapshot, so every copy would get the same numbers. This one draws on the
// kernel's generator, which every copy has for itself.
const pool = Buffer.alloc(4096);
let used = pool.length;

function random() {
  if (used === pool.length) {
    fs.readSync(urandom, pool, 0, pool.length, null);
    used = 0;
  }
  const high = pool.readUInt32LE(used) >>> 5;
  const low = pool.readUInt32LE(used + 4) >>> 6;
  used += 8;
  return (high * 67108864 + low) / 9007199254740992;
}

const urandom = fs.openSync('/dev/urandom', 'r');

function resume(seed, env) {
  Object.assign(process.env, env);
  used = pool.length;
  for (const hook of hooks) {
    try {
      hook(seed, env);
    } catch (error) {
      process.stderr.write(`${error && error.stack}\n`);
    }
  }
}

// What is printed while code runs, up to a limit.
class Output {
  constructor() {
    this.parts = [];
    this.length = 0;
    this.dropped = 0;
  }

  write(chunk, encoding, done) {
    const callback = typeof encoding === 'function' ? encoding : done;
    const text = typeof chunk === 'string' ? chunk : Buffer.from(chunk).toString();
    const kept = text.slice(0, Math.max(0, OUTPUT_MAX - this.length));
    this.parts.push(kept);
    this.length += kept.length;
    this.dropped += text.length - kept.length;
    if (callback) process.nextTick(callback);
    return true;
  }

  text() {
    const note = this.dropped ? `\n... and ${this.dropped} characters more\n` : '';
    return this.parts.join('') + note;
  }
}

function shown(error) {
  if (error && error.code === 'ERR_SCRIPT_EXECUTION_INTERRUPTED') return 'Error: interrupted';
  if (!(error instanceof Error) && !(error && typeof error.stack === 'string')) {
    return `Uncaught ${util.inspect(error)}`;
  }
  // Without the frames of this file and of Node's own loop, which are the same in every stack.
  const lines = String(error.stack).split('\n');
  const frame = (line) => /^\s+at /.test(line);
  const ours = (line) => line.includes(__filename) || /\(?node:(?:repl|vm|internal|domain|events)|at new Promise \(<anonymous>\)/.test(line);
  return lines.filter((line) => !frame(line) || !ours(line)).join('\n');
}

function lineOf(message) {
  const line = Buffer.from(`${JSON.stringify(message)}\n`);
  if (line.length <= LINE_MAX) return line;
  const length = (message.answer || message.error || '').length;
  const error = `the answer has ${length} characters, too many for one line: write it to a file and copy that`;
  return Buffer.from(`${JSON.stringify({ answer: null, error })}\n`);
}

// Node's own prompt evaluates: it knows top-level await, and that `{a: 1}` is a value. What code throws, at once or later
// in a callback, goes to the prompt's domain; it is the error of the eval that runs then.
function evaluator(names, require) {
  const output = new Writable({ write: (chunk, encoding, done) => done() });
  const input = new PassThrough();
  const server = repl.start({ input, output, prompt: '', terminal: false, useGlobal: true, breakEvalOnSigint: true });
  let running = null;
  server._domain.removeAllListeners('error');
  server._domain.on('error', (error) => {
    if (running) running(error);
    else process.stderr.write(`${shown(error)}\n`);
  });
  Object.assign(global, names);
  if (require) global.require = require;
  return (code) =>
    new Promise((resolve, reject) => {
      running = reject;
      server.eval(`${code}\n`, server.context, '[eval]', (error, value) => {
        // "Recoverable" says that a person could type on.
        if (error) reject(error.err || error);
        else resolve(value);
      });
    }).finally(() => {
      running = null;
    });
}

let interrupted = null;
const onInterrupt = () => interrupted && interrupted();

// Node watches for the signal itself while code runs without returning, and leaves it without a handler afterwards. A
// listener that is added before the old one is closed would not be heard either.
async function hearInterrupts() {
  process.removeAllListeners('SIGINT');
  await new Promise(setImmediate);
  process.on('SIGINT', onInterrupt);
}

// Runs code to its end or its interrupt: `{ value }` or `{ error }`.
async function outcome(evaluate, code) {
  const interrupt = new Promise((_, reject) => {
    interrupted = () => reject(new Error('interrupted'));
  });
  interrupt.catch(() => {});
  try {
    process.removeAllListeners('SIGINT');
    const running = evaluate(code);
    running.catch(() => {});
    await hearInterrupts();
    return { value: await Promise.race([running, interrupt]) };
  } catch (error) {
    return { error };
  } finally {
    interrupted = null;
  }
}

async function answer(evaluate, code) {
  const output = new Output();
  const { write } = process.stdout;
  process.stdout.write = output.write.bind(output);
  const done = await outcome(async () => {
    const value = await evaluate(code);
    return value === undefined ? null : util.inspect(value, { maxArrayLength: 1000, maxStringLength: Infinity });
  });
  process.stdout.write = write;
  const result = 'error' in done ? { answer: null, error: shown(done.error) } : { answer: done.value, error: null };
  if (output.parts.length) result.output = output.text();
  return result;
}

// The protocol gets descriptors of its own: code that reads standard input finds its end, and whatever writes to
// descriptor 1 goes to standard error. A new descriptor is the lowest one that is free. Where a worker is not root, it may
// not open the agent's pipes again, and uses them as they are.
function ownDescriptors() {
  try {
    const requests = fs.openSync('/proc/self/fd/0', 'r');
    const replies = fs.openSync('/proc/self/fd/1', 'w');
    fs.closeSync(1);
    fs.openSync('/proc/self/fd/2', 'w');
    fs.closeSync(0);
    fs.openSync('/dev/null', 'r');
    return [requests, replies];
  } catch {
    return [0, 1];
  }
}

// What evaluates code, with what the worker's process needs to go on after it. For a worker with a protocol of its own:
// `outcome(evaluate, code)` runs code, and `resume(seed, env)` is to be called in every copy.
async function start({ names = {}, require } = {}) {
  Math.random = random;
  // Node keeps random bytes for the next ones at hand, and a copy would use those of before the snapshot.
  const { randomUUID } = crypto;
  crypto.randomUUID = (options) => randomUUID({ ...options, disableEntropyCache: true });
  const evaluate = evaluator(names, require);
  await hearInterrupts();
  process.on('unhandledRejection', (error) => process.stderr.write(`${shown(error)}\n`));
  process.on('uncaughtException', (error) => process.stderr.write(`${shown(error)}\n`));
  return evaluate;
}

// Says that the worker is ready, then answers until the agent is gone. `names` are what evaluated code sees, `require` is
// the worker's own, and `rehearse` is code to evaluate before the snapshot, so that no copy is the first to do it.
async function serve({ names = {}, require, rehearse = [] } = {}) {
  const evaluate = await start({ names, require });
  const [requests, replies] = ownDescriptors();
  const reply = (message) => {
    let line = lineOf(message);
    while (line.length) {
      try {
        line = line.subarray(fs.writeSync(replies, line));
      } catch (error) {
        if (error.code !== 'EAGAIN') throw error;
      }
    }
  };
  resume(crypto.randomBytes(32), {});
  for (const code of rehearse) {
    const { error } = await answer(evaluate, code);
    if (error) {
      process.stderr.write(`the rehearsal failed: ${error}\n`);
      process.exit(1);
    }
  }
  const input = requests === 0 ? process.stdin : new net.Socket({ fd: requests, readable: true, writable: false });
  const lines = readline.createInterface({ input, terminal: false });
  // One after the other, however the lines come.
  let last = Promise.resolve();
  lines.on('line', (line) => {
    last = last.then(async () => {
      const request = JSON.parse(line);
      if (request.op === 'resumed') resume(Buffer.from(request.seed, 'hex'), request.env || {});
      else if (request.op === 'eval') reply(await answer(evaluate, request.code));
    });
  });
  lines.on('close', () => process.exit(0));
  if (global.gc) global.gc();
  reply({ ready: true });
}

module.exports = { onCopy, serve, start, outcome, resume, shown };
