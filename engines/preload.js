// Changes how NNI's manager, a Node program, behaves. nni_engine.py makes Node load this file first, by NODE_OPTIONS,
// and sets SPOS_NNI_HOST, the address of the web server, and SPOS_NNI_START_MS, how long the manager waits for the tuner.

const host = process.env.SPOS_NNI_HOST;
const startMs = Number(process.env.SPOS_NNI_START_MS);

// The web server has no password and would listen on every network interface: bind it to the given address.
const net = require('net');
const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (first, ...rest) {
    const callbacks = rest.filter((argument) => typeof argument === 'function');
    if (typeof first === 'number' || /^[0-9]+$/.test(first)) {
        return listen.call(this, {port: Number(first), host}, ...callbacks);
    }
    if (first && typeof first === 'object' && first.port !== undefined) {
        return listen.call(this, {...first, host}, ...rest);
    }
    return listen.call(this, first, ...rest);
};

// The manager gives the tuner 10 s to start, too little on a busy machine, and then hangs: wait longer.
const setTimeout = global.setTimeout;
global.setTimeout = (callback, ms, ...rest) => setTimeout(callback, ms === 10000 ? startMs : ms, ...rest);
Object.defineProperties(global.setTimeout, Object.getOwnPropertyDescriptors(setTimeout));

// The manager keeps two files open for every trial: close its copies, since the child process has its own.
const children = require('child_process');
const spawn = children.spawn;
children.spawn = function (...args) {
    const child = spawn.apply(this, args);
    const stdio = args[args.length - 1]?.stdio;
    (Array.isArray(stdio) ? stdio : []).forEach((stream) => stream?.destroy?.());
    return child;
};

// The manager would outlive a search.py that was killed: end with it.
const parent = process.ppid;
setInterval(() => { if (process.ppid !== parent) process.kill(process.pid, 'SIGTERM'); }, 500).unref();
