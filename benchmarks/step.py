"""The time of a training step: this library's network beside MONAI's and nnU-Net's, the same patch and batch, one run; each part of the network; what PyTorch offers

    python benchmarks/step.py [--rounds 7] [--threads 1] [--only network,part,option] [--device cpu]

A step is forward, Dice with cross-entropy, backward and Adam on two patches of 16×96×96, in float32 on the CPU and under float16 autocast on CUDA (without a loss scaler). All take turns, `rounds` rounds after one of warming up; the table gives median, least and greatest.
On the CPU the time is CPU-seconds (user + system) of the process, so that other jobs disturb less; with --threads above 1, and on CUDA, it is the clock's, with the device synchronised.
`network`: the peers. `part`: forward and backward of each part of ours alone. `option`: channels_last_3d, bfloat16 autocast, torch.compile, computing again, accumulating 2×1, frozen stages, each beside the same network without it.
On CUDA also the share of the convolution limit: 3 × 2 × GMAC / seconds, divided by the TFLOP/s of a large float16 matrix product. That part has not been run yet.
Each run replaces the rows of its kinds in benchmarks/step.csv.
"""
import argparse, csv, os, platform, statistics, time
from contextlib import nullcontext

import torch
from covid3d.encoder import GreyConv3d
from covid3d.memory import on_meta, step_loss
from torch import nn

from budget import here, rows
from memory import ours, peers, small, stages

path,bs = here/'step.csv',2
fields = 'kind name network parameters gmac median least greatest forward backward ratio share rounds note patch bs device torch threads cores machine load'.split()

def gmac(net, size=small):
    "1e9 multiply-accumulates of the convolutions, transposed ones too, of one patch"
    total = []
    def count(m, x, y): total.append((x[0] if isinstance(m, nn.ConvTranspose3d) else y)[0].numel()*m.weight[0].numel())
    meta = on_meta(net)
    for m in meta.modules():
        if isinstance(m, (nn.Conv3d,nn.ConvTranspose3d,GreyConv3d)): m.register_forward_hook(count)
    with torch.no_grad(): meta(torch.zeros(1,1,*size, device='meta'))
    return sum(total)/1e9

def gmac_of(net, part, size=small):
    "The same of one part, transposed convolutions left out"
    macs, meta = {}, on_meta(net).eval()
    for k,m in meta.named_modules():
        if isinstance(m, (nn.Conv3d,GreyConv3d)): m.register_forward_hook(lambda m, _, y, k=k: macs.update({k: y[0].numel()*m.weight[0].numel()}))
    with torch.no_grad(): meta(torch.zeros(1,1,*size, device='meta'))
    return sum(n for k,n in macs.items() if k.startswith(f'{part}.'))/1e9

class Clock:
    "Seconds: of the CPU where one thread works, else of the clock"
    def __init__(self, device, threads): self.device,self.now = device,time.process_time if device=='cpu' and threads==1 else time.perf_counter
    def __call__(self):
        if self.device=='cuda': torch.cuda.synchronize()
        return self.now()

class Step:
    "A network and how it is trained"
    def __init__(self, net, device, channels_last=True, dtype=None, compiled=False, accumulate=1):
        self.net,self.device,self.accumulate,self.channels_last = net.to(device).train(),device,accumulate,channels_last
        self.dtype = dtype or (torch.float16 if device=='cuda' else torch.float32)
        self.params = sum(p.numel() for p in net.parameters())
        if channels_last: self.net.to(memory_format=torch.channels_last_3d)
        self.opt = torch.optim.Adam([p for p in net.parameters() if p.requires_grad])
        self.run = torch.compile(self.net) if compiled else self.net
    def __call__(self):
        n = bs//self.accumulate
        for _ in range(self.accumulate):
            x,y = torch.rand(n,1,*small, device=self.device),torch.zeros(n,1,*small, device=self.device)
            if self.channels_last: x = x.contiguous(memory_format=torch.channels_last_3d)
            with torch.autocast(self.device, self.dtype) if self.dtype!=torch.float32 else nullcontext(): out = self.run(x)
            (step_loss(out, y)/self.accumulate).backward()
        self.opt.step(); self.opt.zero_grad()

def take_turns(steps, rounds, clock):
    "Seconds of each of `steps` in `rounds` rounds, after one that does not count"
    times = {k:[] for k in steps}
    for i in range(rounds+1):
        for k,step in steps.items():
            start = clock(); step(); took = clock()-start
            if i: times[k].append(took)
            elif took>60: print(f'{k}: the first step took {took:.0f} s', flush=True)
    return times

def summary(ts): return dict(median=f'{statistics.median(ts):.3f}', least=f'{min(ts):.3f}', greatest=f'{max(ts):.3f}', rounds=len(ts))

def networks(a, clock):
    nets = {f'covid3d width {w}':ours(w) for w in (64,32,16)} | {k:make() for k,make in peers(small).items()}
    steps = {k:Step(n, a.device) for k,n in nets.items()}
    limit = matmul_limit() if a.device=='cuda' else None
    for k,ts in take_turns(steps, a.rounds, clock).items():
        g = gmac(nets[k])
        yield dict(name=k, parameters=steps[k].params, gmac=f'{g:.2f}', share=f'{6*g*bs*1e9/statistics.median(ts)/limit:.3f}' if limit else '', **summary(ts))

def parts(a, clock):
    "Each part alone: its input and the gradient of its output are given"
    for width in (64,16):
        net = ours(width).to(a.device).to(memory_format=torch.channels_last_3d).train()
        with torch.no_grad():
            x,found,calls = torch.rand(bs,1,*small, device=a.device).contiguous(memory_format=torch.channels_last_3d),{},[]
            volume = x
            for name,stage in net.encoder.named_children(): calls.append((f'encoder.{name}', stage, (x,))); found[name] = x = stage(x)
            for names,(name,level) in zip(net.skips, net.decoder.items()): calls.append((f'decoder.{name}', level, (x,[found[k] for k in names]))); x = level(x, [found[k] for k in names])
            calls.append(('head', net.head, (x,volume)))
        def one(part, args):
            def leaf(t, grad=True): return t.detach().requires_grad_(grad)
            args = [[leaf(t) for t in o] if isinstance(o, list) else leaf(o, o is not volume) for o in args]
            t0 = clock(); y = part(*args); t1 = clock(); g = torch.ones_like(y); t2 = clock()
            torch.autograd.backward(y, g)
            return t1-t0,clock()-t2
        times = {name:[] for name,*_ in calls}
        for i in range(a.rounds+1):
            for name,part,args in calls:
                t = one(part, args)
                if i: times[name].append(t)
        for name,ts in times.items():
            fw,bw = (statistics.median(o) for o in zip(*ts))
            yield dict(name=name, network=f'covid3d width {width}', parameters=sum(p.numel() for p in net.get_submodule(name).parameters()), gmac=f'{gmac_of(net, name):.3f}', forward=f'{fw:.4f}', backward=f'{bw:.4f}', rounds=len(ts))

def compiles(a):
    "Whether torch.compile works here, and the time it takes at first"
    t = time.perf_counter()
    try: step = Step(ours(16), a.device, compiled=True); step(); return step,f'compiling took {time.perf_counter()-t:.0f} s of the clock'
    except Exception as e: return None,f'does not run here: {type(e).__name__}'

def options(a, clock):
    fresh = lambda w, **kw: Step(ours(w), a.device, **kw)
    dyn = lambda **kw: Step(peers(small)['MONAI DynUNet'](), a.device, **kw)
    compiled,note = compiles(a)
    ways = {('as it is','covid3d width 16'):fresh(16), ('not channels_last_3d','covid3d width 16'):fresh(16, channels_last=False), ('bfloat16 autocast','covid3d width 16'):fresh(16, dtype=torch.bfloat16), ('float32','covid3d width 16'):fresh(16, dtype=torch.float32) if a.device=='cuda' else None,
        ('torch.compile','covid3d width 16'):compiled, ('recompute','covid3d width 16'):Step(ours(16, recompute=True), a.device), ('2×1 accumulated','covid3d width 16'):fresh(16, accumulate=2),
        ('stem and layer1 frozen','covid3d width 16'):Step(ours(16, frozen=stages[:2]), a.device), ('encoder frozen','covid3d width 16'):Step(ours(16, frozen=stages), a.device),
        ('group norm','covid3d width 16'):Step(ours(16,'group'), a.device), ('frozen norm','covid3d width 16'):Step(ours(16,'frozen'), a.device),
        ('as it is','covid3d width 64'):fresh(64), ('not channels_last_3d','covid3d width 64'):fresh(64, channels_last=False),
        ('as it is','MONAI DynUNet'):dyn(), ('not channels_last_3d','MONAI DynUNet'):dyn(channels_last=False)}
    times = take_turns({k:s for k,s in ways.items() if s}, a.rounds, clock)
    for (name,network),step in ways.items():
        if not step:
            if name=='torch.compile': yield dict(name=name, network=network, note=note)
            continue
        ts,base = times[name,network],times['as it is',network]
        yield dict(name=name, network=network, ratio=f'{statistics.median(t/b for t,b in zip(ts, base)):.3f}', note=note if name=='torch.compile' else '', **summary(ts))

def matmul_limit(n=8192, times=20):
    "Floating point operations a second of a float16 matrix product"
    x = torch.rand(n,n, device='cuda', dtype=torch.float16)
    for i in range(times+5):
        if i==5: torch.cuda.synchronize(); t = time.perf_counter()
        x@x
    torch.cuda.synchronize()
    return 2*n**3*times/(time.perf_counter()-t)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=7); p.add_argument('--threads', type=int, default=1); p.add_argument('--only', default='network,part,option')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    a = p.parse_args()
    torch.set_num_threads(a.threads); torch.manual_seed(0); torch.backends.cudnn.benchmark = True
    clock,kinds = Clock(a.device, a.threads),dict(network=networks, part=parts, option=options)
    common = dict(patch='x'.join(map(str, small)), bs=bs, device=torch.cuda.get_device_name() if a.device=='cuda' else 'cpu', torch=torch.__version__.split('+')[0], threads=a.threads, cores=os.cpu_count(), machine=platform.machine())
    for kind in a.only.split(','):
        new = []
        for r in kinds[kind](a, clock):
            new.append(dict(kind=kind) | r | common | dict(load=f'{os.getloadavg()[0]:.1f}')); print({k:v for k,v in new[-1].items() if k not in common}, flush=True)
        kept = [r for r in rows(path) if not (r['kind']==kind and r['device']==common['device'])]
        with path.open('w', newline='') as f:
            w = csv.DictWriter(f, fields, restval='', lineterminator='\n'); w.writeheader(); w.writerows(kept+new)
