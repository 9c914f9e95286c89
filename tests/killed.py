"""A process that imports covid3d once and forks a child for each command, to be killed by the dozen: not a test, started by those of resuming.

A line of JSON in: argv of `covid3d`; `after` seconds, or `writing` (the n-th checkpoint is half written), when it is killed (or sent `signal`); `limit`, the largest file once `room` checkpoints with
tensors are there, 1 if not given; `keep`, a folder for a link to each checkpoint; `score`, whether a made-up score of the weights, best in the second epoch, stands for the Dice of
whole scans, which is 0 in so small a training; `nan`, whether a patch in step 3 of the second epoch is NaN; `term`, whether SIGTERM comes in that step. A line of JSON out: status (negative: killed), seconds, stdout, stderr."""
import json, math, os, resource, signal, sys, tempfile, time
from pathlib import Path

import torch
import covid3d.callbacks, covid3d.checkpoint, covid3d.learner
from covid3d.cli import main

write_checkpoint = covid3d.checkpoint.write_checkpoint

def kept(folder):
    "`write_checkpoint` that leaves a link to each checkpoint, named by phase and epoch"
    def write(path, state, tensors):
        write_checkpoint(path, state, tensors)
        to = Path(folder)/f'{state["phase"]}-{state["epoch"]}.safetensors'
        if tensors: to.parent.mkdir(exist_ok=True); to.unlink(missing_ok=True); os.link(path, to)
    return write

def marked(write, mark):
    "`write` with a file `mark` that is there while it works"
    def marking(path, state, tensors):
        mark.touch()
        try: write(path, state, tensors)
        finally: mark.unlink(missing_ok=True)
    return marking

def made_up(self, case)->float:
    "A score that every weight changes, in place of `ScanDice.score`"
    total = sum(v.double().sum() for v in self.learn.model.state_dict().values())
    return self.learn.epoch%2/2+float(total*1000%1)/4

def in_a_step(do):
    "A `before_batch` that calls `do` in step 3 of the second epoch"
    def before_batch(self):
        if self.training and (self.n_epoch,self.epoch,self.iter)==(3,1,2): do(self)
    return before_batch

def spoil(self): self.learn.xb = (self.x*math.nan,)
def terminate(self): os.kill(os.getpid(), signal.SIGTERM)

def child(o, out, err):
    "The command, in a process of its own"
    for fd,f in ((1,out),(2,err)): os.dup2(f.fileno(), fd)
    torch.set_num_threads(1)
    covid3d.checkpoint.write_checkpoint = marked(kept(o['keep']) if 'keep' in o else write_checkpoint, Path(o['mark']))
    if o.get('score'): covid3d.learner.ScanDice.score = made_up
    if do := spoil if o.get('nan') else terminate if o.get('term') else None: covid3d.callbacks.StopOnNaN.before_batch = in_a_step(do)
    try: status = main(o['argv'])
    except SystemExit as e: status = e.code
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(status)

def watch(pid, o):
    "Kill the child at its moment; its status"
    start,mark,seen,was = time.monotonic(),Path(o['mark']),0,False
    while True:
        got,status = os.waitpid(pid, os.WNOHANG)
        if got: return os.waitstatus_to_exitcode(status)
        now = mark.exists()
        seen,was = seen+(now and not was),now
        if 'after' in o and time.monotonic()-start>o['after'] or now and seen==o.get('writing'): os.kill(pid, getattr(signal, o.get('signal', 'SIGKILL'))); o.pop('after', None); o.pop('writing', None)
        if 'limit' in o and seen>o.get('room', 1) and not now: resource.prlimit(pid, resource.RLIMIT_FSIZE, (o.pop('limit'),)*2)
        time.sleep(.0002)

if __name__=='__main__':
    print('ready', flush=True)
    for line in sys.stdin:
        o = json.loads(line)
        with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err, tempfile.TemporaryDirectory() as at:
            o['mark'] = f'{at}/writing'
            start,pid = time.monotonic(),os.fork()
            if not pid: child(o, out, err)
            status = watch(pid, o); secs = time.monotonic()-start
            out.seek(0); err.seek(0)
            print(json.dumps(dict(status=status, secs=secs, out=out.read(), err=err.read())), flush=True)
