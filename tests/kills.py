"""Starts commands of covid3d in forked children, and kills them: a helper of test_kills.py, not a test.

A line of JSON in: `argv`; `after`, seconds until SIGKILL, or null. A line out: `status` (negative: killed), `secs`, `out`, `err`.
With `beside`, the command is held as soon as the file `lock` is there, a second command runs, and the first goes on; the answer of
the second comes under `second`. Phantoms are small in all of them, whatever is asked for."""
import fcntl, json, os, signal, struct, sys, tempfile, time

import torch
import covid3d.evaluate, covid3d.learner, covid3d.phantom, covid3d.pretrain, covid3d.folds, covid3d.reproduce, covid3d.prepare  # noqa: F401 once, for all children
from covid3d.cli import main

plain,grid = covid3d.phantom.phantom,((32,96,96),(9.,3.7,3.7))
covid3d.phantom.phantom = lambda seed, *_: plain(seed, *grid)

def start(argv, out, err) -> int:
    "A child that runs a command; its process number"
    if pid := os.fork(): return pid
    os.setsid()  # its workers are killed with it
    for fd,f in ((1,out), (2,err)): os.dup2(f.fileno(), fd)
    torch.set_num_threads(1)
    status = 70
    try: status = main(argv)
    except SystemExit as e: status = e.code
    finally:
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(status or 0)

def run(argv, after=None, meanwhile=None) -> dict:
    "A command from start to end, killed after some seconds; `meanwhile` is called with its process number until it gives something"
    with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
        begun,pid,more,status = time.monotonic(),start(argv, out, err),None,None
        while status is None:
            got,code = os.waitpid(pid, os.WNOHANG)
            if got: status = os.waitstatus_to_exitcode(code); break
            if after is not None and time.monotonic()-begun>after: os.killpg(pid, signal.SIGKILL) if os.getpgid(pid)==pid else os.kill(pid, signal.SIGKILL)
            if meanwhile and more is None: more = meanwhile(pid)
            time.sleep(.0005)
        out.seek(0); err.seek(0)
        return dict(status=status, secs=time.monotonic()-begun, out=out.read(), err=err.read(), second=more)

def is_held(lock) -> bool:
    "Whether a process has locked the file `lock`"
    try:
        with open(lock) as f: return struct.unpack_from('h', fcntl.fcntl(f, fcntl.F_GETLK, struct.pack('hhqqi4x', fcntl.F_RDLCK, 0, 0, 0, 0)))[0]!=fcntl.F_UNLCK
    except FileNotFoundError: return False

def run_beside(pid, argv, lock) -> dict:
    "A command run while the child `pid`, which holds `lock`, is stopped; None if it does not hold it"
    if not is_held(lock): return None
    os.killpg(pid, signal.SIGSTOP)
    try: return run(argv) if is_held(lock) else None
    finally: os.killpg(pid, signal.SIGCONT)

if __name__=='__main__':
    print('ready', flush=True)
    for line in sys.stdin:
        o = json.loads(line)
        beside = (lambda pid: run_beside(pid, o['beside'], o['lock'])) if 'beside' in o else None
        print(json.dumps(run(o['argv'], o.get('after'), beside)), flush=True)
