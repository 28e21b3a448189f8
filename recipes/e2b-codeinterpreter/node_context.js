// A JavaScript context: Node's own prompt. Requests come as lines of JSON at descriptor 3; what a run gives goes back as
// lines of the code interpreter's interface, up to `end_of_execution`. What is printed goes to descriptors 1 and 2.

'use strict';

const forkd = require('/forkd/workers/forkd_worker.js');
const module_ = require('module');
const net = require('net');
const path = require('path');
const readline = require('readline');
const util = require('util');

const channel = new net.Socket({ fd: Number(process.env.FORKD_CHANNEL), readable: true, writable: true });
delete process.env.FORKD_CHANNEL;
let count = 0;

function send(line) {
  channel.write(`${JSON.stringify(line).replace(/[^\x00-\x7f]/g, escaped)}\n`);
}

// The interface's readers may see a letter of several bytes in two pieces.
function escaped(letter) {
  return `\\u${letter.charCodeAt(0).toString(16).padStart(4, '0')}`;
}

// A prompt has no `import` statements; the same as expressions.
function withoutImports(code) {
  const names = (list) => list.replace(/\bas\b/g, ':').replace(/^\{|\}$/g, '');
  return code.replace(
    /^import\s+(?:([\w$]+)\s*,?\s*)?(?:(\{[^}]*\})|\*\s*as\s+([\w$]+))?\s*(?:from\s*)?(['"][^'"]+['"])[ \t]*(?:;|$)/gm,
    (whole, main, list, all, from) => {
      const parts = [main && `default: ${main}`, list && names(list)].filter(Boolean).join(', ');
      if (all) return `const ${all} = await import(${from});${main ? ` const { default: ${main} } = ${all};` : ''}`;
      return parts ? `const { ${parts} } = await import(${from});` : `await import(${from});`;
    },
  );
}

// A name may be declared again in a later cell, as in other notebooks. Only lines that begin so are at the top level for
// sure enough; a template's text would have to look just like it.
function redeclarable(code) {
  return code.replace(/^(?:const|let)(?=[\s{[])/gm, 'var').replace(/^class\s+([\w$]+)/gm, 'var $1 = class $1');
}

function described(error) {
  const traceback = forkd.shown(error).split('\n').filter((line) => !line.includes(__filename)).join('\n');
  const isError = error instanceof Error || (error && typeof error.stack === 'string');
  const [name, value] = isError ? [error.name, error.message] : [typeof error, util.inspect(error)];
  return { name: String(name), value: String(value), traceback };
}

// What the interface knows of a value beside its text.
function result(value) {
  if (value === undefined) return null;
  const text = typeof value === 'string' ? value : util.inspect(value);
  const line = { type: 'result', is_main_result: true, text };
  const plain = value && [Object.prototype, Array.prototype].includes(Object.getPrototypeOf(value));
  try {
    if (plain) line.json = JSON.parse(JSON.stringify(value));
  } catch {
    // A circle has no JSON.
  }
  return line;
}

async function run(evaluate, { code, env_vars: env, typescript }) {
  count += 1;
  send({ type: 'number_of_executions', execution_count: count });
  const before = Object.fromEntries(Object.keys(env).map((name) => [name, process.env[name]]));
  Object.assign(process.env, env);
  const done = await forkd.outcome(async () => {
    const javascript = typescript ? module_.stripTypeScriptTypes(code, { mode: 'transform' }) : code;
    return result(await evaluate(redeclarable(withoutImports(javascript))));
  });
  for (const [name, old] of Object.entries(before)) {
    if (old === undefined) delete process.env[name];
    else process.env[name] = old;
  }
  if ('error' in done) send({ type: 'error', ...described(done.error) });
  else if (done.value) send(done.value);
}

async function main() {
  const evaluate = await forkd.start({ require: module_.createRequire(path.join(process.cwd(), 'code')) });
  let last = Promise.resolve();
  const operations = {
    run: (request) => run(evaluate, request),
    become: ({ env }) => forkd.resume(null, env),
    forget: () => {
      count = 0;
    },
  };
  readline.createInterface({ input: channel }).on('line', (line) => {
    const request = JSON.parse(line);
    last = last.then(async () => {
      if (request.cwd) process.chdir(request.cwd);
      await operations[request.op](request);
      // The one line that the server compares.
      channel.write('{"type": "end_of_execution"}\n');
    });
  });
  channel.on('close', () => process.exit(0));
}

main();
