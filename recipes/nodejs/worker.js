// Warm worker: Node with its own prompt's evaluator. The protocol is in /forkd/workers/forkd_worker.js.

'use strict';

const forkd = require('/forkd/workers/forkd_worker.js');

forkd.serve({ require });
