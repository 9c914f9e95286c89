"""Bytes kept for the backward pass: this library's network beside MONAI's and nnU-Net's at the same patch; the counted peak of a step beside the measured one

    python benchmarks/memory.py [--only saved,pieces,peak,cuda]

`saved`: megabytes kept for backward by the definition in nbs/13_memory.ipynb (storages that live for the gradient's sake, without parameters, buffers and input), one patch, float32, counted on the meta device.
`pieces`: where to cut for activation checkpointing: kept, at the peak, and seconds of CPU for a step of two patches, median of 5 rounds that take turns.
`peak`: growth of a process's resident memory (VmHWM) in a step, each in a process of its own after a small step of warming up, one thread, beside forward + backward + workspace of `step_bytes`.
`cuda`: for budgets of 6, 8, 11 and 24 GB, in a process each, held to the budget by set_per_process_memory_fraction: the plan, peak allocated memory, seconds a step (of 4 patches, median of 10). Needs a CUDA device. cuDNN takes its quickest algorithms (`cudnn.benchmark`); `train` allows deterministic ones alone.
Each measurement adds a row to benchmarks/memory.csv; one that has its row is not repeated.
"""
import argparse, json, os, statistics, subprocess, sys, time
from pathlib import Path

import torch
from covid3d.encoder import encoder3d
from covid3d.memory import live_step, plan_memory, program_bytes, saved_bytes, step_bytes, step_loss
from covid3d.unet import DynamicUnet3d
from torch import nn

from budget import add_row, done, here, versions

path,stages = here/'memory.csv',('stem','layer1','layer2','layer3','layer4')
small,large = (16,96,96),(32,128,128)
text = lambda size: 'x'.join(map(str, size))

def ours(width=16, norm='batch', frozen=(), **kwargs):
    net = DynamicUnet3d(encoder3d('r3d_18', False, width, norm), **kwargs)
    for name in frozen: net.encoder.get_submodule(name).requires_grad_(False)
    return net

def strides(patch):
    "nnU-Net's rule where the spacing is near isotropic: each stage halves the axes that keep 4 voxels"
    res,size = [(1,1,1)],list(patch)
    while any(n>=8 for n in size) and len(res)<6:
        res.append(tuple(2 if n>=8 else 1 for n in size)); size = [-(-n//s) for n,s in zip(size, res[-1])]
    return res

def nnunet(patch, residual=False, deep=True):
    "nnU-Net's default network for `patch`, as its planner sets it up: 32 to 320 channels, instance normalisation, leaky ReLU; deep supervision if `deep`"
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
    s = strides(patch); n = len(s)
    common = dict(input_channels=1, n_stages=n, features_per_stage=[min(320, 32*2**i) for i in range(n)], conv_op=nn.Conv3d, kernel_sizes=[[3]*3]*n, strides=s, num_classes=1, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs=dict(eps=1e-5, affine=True), nonlin=nn.LeakyReLU, nonlin_kwargs=dict(inplace=True), deep_supervision=deep)
    if residual: return ResidualEncoderUNet(n_blocks_per_stage=(1,3,4,6,6,6)[:n], n_conv_per_stage_decoder=[1]*(n-1), **common)
    return PlainConvUNet(n_conv_per_stage=[2]*n, n_conv_per_stage_decoder=[2]*(n-1), **common)

def peers(patch):
    from peers import dynunet, monai_unet, segresnet
    return {'MONAI UNet':monai_unet, 'MONAI SegResNet':segresnet, 'MONAI DynUNet':dynunet, 'nnU-Net plain':lambda: nnunet(patch), 'nnU-Net residual':lambda: nnunet(patch, True)}

def row(kind, network, patch, bs, setting, make):
    "Add a row with what `make` gives, unless it is there"
    key = dict(kind=kind, network=network, patch=text(patch), bs=bs, setting=setting)
    if done(path, **key): return
    values = dict(mb='', predicted_mb='', error='', peak_mb='', seconds='', budget_gb='', device='cpu') | make()
    add_row(path, {**key, **values, **versions(), 'cores':os.cpu_count()})

def saved():
    frozen = {'all trained':(), 'stem and layer1 frozen':stages[:2], 'encoder frozen':stages}
    for patch in (small,large):
        for width in (64,32,16):
            for again in (False,True):
                for setting,names in frozen.items():
                    row('saved', f'covid3d width {width}', patch, 1, setting+', recompute'*again, make=lambda: dict(mb=f'{saved_bytes(ours(width, frozen=names, recompute=again), patch)/1e6:.1f}'))
        for name,make in peers(patch).items(): row('saved', name, patch, 1, 'all trained', make=lambda: dict(mb=f'{saved_bytes(make(), patch)/1e6:.1f}'))

def cpu_step(net, opt, patch, bs):
    x,y = torch.rand(bs,1,*patch),(torch.rand(bs,1,*patch)>.9).float()
    t = time.process_time()
    loss = step_loss(net(x), y); opt.zero_grad(); loss.backward(); opt.step()
    return time.process_time()-t

def pieces(rounds=5):
    import covid3d.unet
    blocks,whole = covid3d.unet._pieces,lambda stage: [stage]
    ways = {'nothing again':(False,blocks), 'whole stages again':(True,whole), 'single blocks again':(True,blocks)}
    for width,patch in ((16,small),(64,small)):
        if done(path, kind='pieces', network=f'covid3d width {width}', patch=text(patch)): continue
        nets,seconds = {k:ours(width, recompute=r) for k,(r,_) in ways.items()},{k:[] for k in ways}
        opts = {k:torch.optim.Adam(n.parameters()) for k,n in nets.items()}
        for i in range(rounds+1):
            for k,(_,cut) in ways.items():
                covid3d.unet._pieces = cut
                t = cpu_step(nets[k], opts[k], patch, 2)
                if i: seconds[k].append(t)
        for k,(_,cut) in ways.items():
            covid3d.unet._pieces = cut
            net = nets[k]; net.zero_grad()
            weights = sum(t.nbytes*(1+t.requires_grad) for t in [*net.parameters(),*net.buffers()])
            row('pieces', f'covid3d width {width}', patch, 2, k, make=lambda: dict(mb=f'{saved_bytes(net, patch, 2)/1e6:.1f}', peak_mb=f'{(live_step(net, patch, 2)[1]-weights)/1e6:.1f}', seconds=f'{statistics.median(seconds[k]):.2f}'))
        covid3d.unet._pieces = blocks

def status(key): return int(next(o for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(key)).split()[1])*1024

def one_peak(width, norm, again, bs, patch, channels_last=False):
    "Growth of resident memory in one step, in megabytes, and what is predicted"
    net = ours(width, norm, recompute=again).train(); opt = torch.optim.Adam(net.parameters())
    if channels_last: net.to(memory_format=torch.channels_last_3d)
    cpu_step(net, opt, (16,16,16), 1)
    for p in net.parameters(): p.grad = torch.zeros_like(p)
    Path('/proc/self/clear_refs').write_text('5')
    before = status('VmRSS')
    for _ in range(2):
        step_loss(net(torch.rand(bs,1,*patch)), torch.zeros(bs,1,*patch)).backward(); opt.step(); opt.zero_grad(set_to_none=False)
    grown,parts = status('VmHWM')-before,step_bytes(net, patch, bs)
    print(json.dumps((grown/1e6, sum(parts[k] for k in ('forward','backward','workspace'))/1e6)))

def peak():
    for width,norm,again,bs,patch in ((16,'batch',False,2,small), (16,'batch',True,2,small), (16,'group',False,2,large), (16,'group',True,2,large), (32,'frozen',False,2,small), (32,'frozen',False,1,large), (64,'frozen',False,2,small), (64,'frozen',True,2,small)):
        def make():
            env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536', MALLOC_TRIM_THRESHOLD_='65536', OMP_NUM_THREADS='1')
            res = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--one', json.dumps([width,norm,again,bs,patch])], env=env, capture_output=True, text=True, check=True)
            grown,predicted = json.loads(res.stdout.splitlines()[-1])
            return dict(mb=f'{grown:.1f}', predicted_mb=f'{predicted:.1f}', error=f'{predicted/grown-1:.3f}')
        row('peak', f'covid3d width {width}', patch, bs, norm+', recompute'*again, make=make)

# The part below needs a CUDA device; it has not been run yet

def one_cuda(network, patch, bs, budget, steps=10):
    "Peak allocated megabytes and seconds of a step within `budget` bytes"
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1., (budget-program_bytes['cuda'])/total))
    torch.backends.cudnn.benchmark = True
    n,plan = bs,None
    if network.startswith('covid3d'):
        net = ours(int(network.split()[-1]), 'frozen'); plan = plan_memory(net, patch, budget, bs, 'cuda'); n,net.recompute = plan.bs,plan.recompute
    else: net = peers(patch)[network]()
    net.cuda().train()
    opt,scaler,times = torch.optim.Adam(net.parameters()),torch.amp.GradScaler('cuda'),[]
    try:
        for i in range(steps+3):
            torch.cuda.synchronize(); t = time.perf_counter()
            for _ in range(bs//n):
                x,y = torch.rand(n,1,*patch, device='cuda'),torch.zeros(n,1,*patch, device='cuda')
                with torch.autocast('cuda', torch.float16): out = net(x)
                scaler.scale(step_loss(out, y)*n/bs).backward()
            scaler.step(opt); scaler.update(); opt.zero_grad(set_to_none=False)
            torch.cuda.synchronize(); times.append(time.perf_counter()-t)
    except torch.cuda.OutOfMemoryError: return print(json.dumps(dict(setting='out of memory', predicted_mb=f'{plan.bytes/1e6:.0f}' if plan else '')))
    print(json.dumps(dict(setting=str(plan or f'{bs} patches at a time, fp16'), predicted_mb=f'{(plan.bytes-program_bytes["cuda"])/1e6:.0f}' if plan else '',
        peak_mb=f'{torch.cuda.max_memory_allocated()/1e6:.0f}', mb=f'{torch.cuda.max_memory_reserved()/1e6:.0f}', seconds=f'{statistics.median(times[3:]):.3f}', device=torch.cuda.get_device_name())))

def cuda():
    if not torch.cuda.is_available(): return print('cuda: no device here, nothing measured')
    patch,bs,total = (64,192,192),4,torch.cuda.get_device_properties(0).total_memory
    for gb in (6,8,11,24):
        for network in ('covid3d width 64','covid3d width 32','covid3d width 16',*peers(patch)):
            if gb*1e9>total or done(path, kind='cuda', network=network, budget_gb=gb): continue
            res = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--one-cuda', json.dumps([network,patch,bs,gb*10**9])], capture_output=True, text=True)
            values = json.loads(res.stdout.splitlines()[-1]) if res.returncode==0 else dict(setting=(res.stderr.splitlines() or ['failed'])[-1])
            row('cuda', network, patch, bs, values.pop('setting'), make=lambda: values|dict(budget_gb=gb))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', default='saved,pieces,peak,cuda'); p.add_argument('--one'); p.add_argument('--one-cuda')
    a = p.parse_args()
    torch.manual_seed(0)
    if a.one: torch.set_num_threads(1); one_peak(*json.loads(a.one))
    elif a.one_cuda: one_cuda(*json.loads(a.one_cuda))
    else:
        for name in a.only.split(','): dict(saved=saved, pieces=pieces, peak=peak, cuda=cuda)[name]()
