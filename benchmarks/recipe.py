"""The tables behind the recipe: one choice changed at a time, seven real scans, whole-scan Dice on each scan's own grid

    COVID3D_TEST_DATA=folder python benchmarks/recipe.py [--only REGEX] [--seconds 300 | --patches 68] [--folds 0] [--seeds 0] [--encoder FILE] [--phantoms] [--out _bench]

Each run adds a row to benchmarks/recipe.csv; a run that has its row is not repeated. CPU-seconds are user + system time of the process, patches and augmentation included; nothing is chosen on the scans that are scored, so
there is no validation. `base` is the state of the recipe before this table: Dice + cross-entropy, first weights of the head of 0.1. Choices marked * start from `--encoder`, as `covid3d pretrain` writes it; the others from random weights. `--phantoms` takes seven phantoms in place of the scans.
"""
import argparse, hashlib, itertools, json, re
from copy import deepcopy
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientClip
from fastai.learner import Learner
from torch import nn

from budget import Budget, add_row, budget_name, done, here, seven_scans, versions
from covid3d import losses
from covid3d.augment import Augment3d, Blur3d, Brightness3d, Contrast3d, Flip3d, Gamma3d, Noise3d, Sharpen3d
from covid3d.encoder import encoder3d
from covid3d.evaluate import score_cases
from covid3d.inference import Segmenter
from covid3d.learner import CTDataLoaders, CTSpec, light_aug_transforms, r3d_18, set_seed
from covid3d.phantom import write_phantoms
from covid3d.unet import DynamicUnet3d, _logit_conv, param_groups, _resize

path = here/'recipe.csv'
base = dict(width=16, norm='batch', decoder=None, lr=2e-3, bs=2, spacing=(4,2.8,2.8), patch=(16,96,96), oversample_foreground=.5, aug='light', loss='DiceCELoss', up='trilinear', stem_skip=True, input_skip=False, attention=False,
            decoder_norm='group', deep=False, head=.1, prior=.05, ema=0, frozen=0., cut='', ratio=1., wd=.01, bf16=False, clip=0.)

# name → what differs from `base`; a leading * means pretrained
choices = {'base':{}, 'learning rate 5e-3':dict(lr=5e-3), 'loss: Dice + focal':dict(loss='DiceFocalLoss'), 'loss: Tversky':dict(loss='TverskyLoss'), 'moving average':dict(ema=.99),
    'Dice + focal, moving average':dict(loss='DiceFocalLoss', ema=.99), '* Dice + focal, moving average, rates 1:10':dict(loss='DiceFocalLoss', ema=.99, ratio=10.),
    'focal, p 0.7':dict(loss='DiceFocalLoss', oversample_foreground=.7), '* focal, p 0.7, 1:10':dict(loss='DiceFocalLoss', oversample_foreground=.7, ratio=10.), '* focal, p 0.33, 1:10':dict(loss='DiceFocalLoss', oversample_foreground=.33, ratio=10.), '* focal, p 0.33':dict(loss='DiceFocalLoss', oversample_foreground=.33),
    'head: first weights 0.01':dict(head=.01), 'head: first weights 0.3':dict(head=.3), 'head: first weights n^-1/2':dict(head=None), 'head: prior 0.2':dict(prior=.2),
    'patches at lesions: 0.8':dict(oversample_foreground=.8), 'patches at lesions: 0.2':dict(oversample_foreground=.2), '* base':{}, '* learning rates 1:10':dict(ratio=10.)}

# The second round starts from what the first one chose: Dice + focal loss, first weights of the head n^-1/2, patches at lesions 0.7; from pretrained weights, stem and layer 1 frozen and rates 1:3
now,kept = dict(loss='DiceFocalLoss', head=None, oversample_foreground=.7),dict(cut='layer1', ratio=3.)
second = {'now':{}, 'loss: Dice + cross-entropy':dict(loss='DiceCELoss'), 'loss: Tversky + focal':dict(loss='TverskyFocal'), 'loss: Lovász':dict(loss='LovaszHingeLoss'), 'up: pixel shuffle':dict(up='shuffle'), 'up: transposed':dict(up='transposed'),
    'decoder 64,32,16':dict(decoder=(64,32,16)), 'decoder 16,8,4':dict(decoder=(16,8,4)), 'decoder norm: instance':dict(decoder_norm='instance'), 'decoder norm: batch':dict(decoder_norm='batch'),
    'encoder norm: group':dict(norm='group'), 'encoder norm: instance':dict(norm='instance'), 'batch 1':dict(bs=1), 'batch 1, encoder norm: group':dict(bs=1, norm='group'), 'batch 1, encoder norm: instance':dict(bs=1, norm='instance'),
    'no stem skip':dict(stem_skip=False), 'input skip':dict(input_skip=True), 'attention':dict(attention=True), 'deep supervision':dict(deep=True), 'moving average':dict(ema=.99), 'bfloat16':dict(bf16=True), 'width 8':dict(width=8), 'width 32':dict(width=32),
    'patch 16×64×64':dict(patch=(16,64,64)), 'patch 16×128×128':dict(patch=(16,128,128)), 'spacing 6×4×4, patch 16×64×64':dict(spacing=(6,4,4), patch=(16,64,64)), 'augmentation: full':dict(aug='full'), 'augmentation: none':dict(aug='none'), 'patches at lesions: 0.5':dict(oversample_foreground=.5), 'gradients clipped at 12':dict(clip=12.),
    '* now':dict(ratio=10.), '* now, rates 1:3':dict(ratio=3.), '* now, one rate':{}, '* now, frozen start, 10 %':dict(ratio=3., frozen=.1), '* now, encoder frozen':dict(frozen=2.),
    '* now, encoder norm: frozen':kept|dict(norm='frozen'), '* now, stem and layer1 frozen, 1:3':kept, '* now, stem and layer1 frozen, 1:3, grey':kept|dict(aug='grey'), '* now, stem to layer2 frozen, 1:3':kept|dict(cut='layer2'), '* now, stem and layer1 frozen, 1:3, patches at lesions: 0.5':kept|dict(oversample_foreground=.5), '* now, batch 1, encoder norm: frozen':kept|dict(bs=1, norm='frozen'),
    '* now, stem and layer1 frozen, 1:3, up: transposed':kept|dict(up='transposed'), '* now, stem and layer1 frozen, 1:3, up: pixel shuffle':kept|dict(up='shuffle'), '* now, stem and layer1 frozen, 1:3, decoder 64,32,16':kept|dict(decoder=(64,32,16)),
    '* now, stem and layer1 frozen, 1:3, loss: Lovász':kept|dict(loss='LovaszHingeLoss'), '* now, stem and layer1 frozen, 1:3, up: transposed, decoder 64,32,16':kept|dict(up='transposed', decoder=(64,32,16))}
choices |= {k if 'now' in k else 'now, '+k:now|v for k,v in second.items()}

class EMA(Callback):
    "The moving average of the weights, used when the fit ends"
    def __init__(self, decay): self.decay = decay
    def before_fit(self): self.mean,self.n = deepcopy(self.learn.model),0
    def after_batch(self):
        if not self.training: return
        self.n += 1; d = min(self.decay, (1+self.n)/(10+self.n))
        with torch.no_grad():
            for m,p in zip(self.mean.state_dict().values(), self.learn.model.state_dict().values()): m.lerp_(p, 1-d) if m.is_floating_point() else m.copy_(p)
    def after_fit(self): self.learn.model.load_state_dict(self.mean.state_dict())

class BFloat16(Callback):
    "The forward pass in bfloat16, weights in float32"
    order = 100
    def before_batch(self): self.cast = torch.autocast('cpu', torch.bfloat16); self.cast.__enter__()
    def after_loss(self): self.cast.__exit__(None, None, None)

class DeepUnet(DynamicUnet3d):
    "Logits of each decoder level while training: deep supervision"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.aux = nn.ModuleList(_logit_conv(l.join[0].out_channels, len(self.classes)) for l in [*self.decoder.values()][:-1])
    def forward(self, x):
        found,outs,volume = {},[],x
        for name,stage in self.encoder.named_children(): found[name] = x = stage(x)
        for names,level in zip(self.skips, self.decoder.values()): x = level(x, [found.pop(n) for n in names]); outs.append(x)
        logits = self.head(x, volume)
        return [logits, *(_resize(a(o), volume.shape[2:]) for a,o in zip(self.aux[::-1], outs[-2::-1]))] if self.training else logits

augmentations = dict(light=light_aug_transforms(), full=None, none=False, grey=Augment3d([Flip3d(), Contrast3d(.3, p=1), Brightness3d(.1, p=1), Gamma3d(.6, 1.6), Noise3d(.05), Blur3d(1.), Sharpen3d(.8)]))

class TverskyFocal(nn.Module):
    "Tversky and focal loss"
    def __init__(self): super().__init__(); self.tversky,self.focal = losses.TverskyLoss(),losses.DiceFocalLoss(dice=0.)
    def forward(self, logits, y): return self.tversky(logits, y)+self.focal(logits, y)

class DeepLoss(nn.Module):
    "A loss of several logits, each coarser one with half the weight"
    def __init__(self, loss): super().__init__(); self.loss = loss
    def forward(self, logits, y):
        if not isinstance(logits, list): return self.loss(logits, y)
        w = [.5**i for i in range(len(logits))]
        return sum(k*self.loss(l, y) for k,l in zip(w, logits))/sum(w)

class Thaw(Callback):
    "Train the decoder alone for a share of the budget"
    def __init__(self, share, budget): self.share,self.budget = share,budget
    def before_fit(self): self.body(False)
    def before_batch(self):
        if self.share and self.budget.share>=self.share: self.body(True); self.share = 0
    def body(self, on):
        for n,s in self.learn.model.encoder.named_children(): s.requires_grad_(on and n not in self.learn.model.cut)

def learner(dls, c, pretrained):
    enc = encoder3d(r3d_18, pretrained or False, c['width'], c['norm'])
    net = (DeepUnet if c['deep'] else DynamicUnet3d)(enc, decoder=c['decoder'], stem_skip=c['stem_skip'], input_skip=c['input_skip'], up=c['up'], attention=c['attention'], decoder_norm=c['decoder_norm'], prior=c['prior'])
    nn.init.normal_(net.head.logits.weight, std=c['head'] or net.head.logits.in_channels**-.5)
    net.cut = {'':(), 'stem':('stem',), 'layer1':('stem','layer1'), 'layer2':('stem','layer1','layer2')}[c['cut']]
    for n in net.cut: net.encoder.get_submodule(n).requires_grad_(False)
    loss = TverskyFocal() if c['loss']=='TverskyFocal' else getattr(losses, c['loss'])()
    return Learner(dls, net.to(memory_format=torch.channels_last_3d), loss_func=DeepLoss(loss) if c['deep'] else loss, metrics=[], splitter=param_groups, train_bn=False, wd=c['wd'])

def digest(name, encoder)->str: return hashlib.blake2b(Path(encoder).read_bytes(), digest_size=4).hexdigest() if name[0]=='*' else ''

def seven_phantoms(out)->Path:
    "The case table of seven phantoms"
    if not (out/'phantoms'/'cases.csv').exists(): write_phantoms(out/'phantoms', 7, seed=1000)
    return out/'phantoms'/'cases.csv'

def run(data, table, name, fold, seed, budget, encoder):
    "Train and score one choice"
    set_seed(seed, reproducible=True)
    c = base|choices[name]
    spec = CTSpec(spacing=c['spacing'], patch=c['patch'])
    dls = CTDataLoaders.from_table(table, spec, bs=c['bs'], fold=(fold,3), patches=6, oversample_foreground=c['oversample_foreground'], device='cpu', aug=augmentations[c['aug']])
    learn = learner(dls, c, encoder if name[0]=='*' else None)
    b = Budget(slice(c['lr']/c['ratio'], c['lr']) if c['ratio']!=1 else c['lr'], **budget)
    cbs = [b]+[EMA(c['ema'])]*bool(c['ema'])+[Thaw(c['frozen'], b)]*bool(c['frozen'])+[BFloat16()]*c['bf16']+[GradientClip(c['clip'])]*bool(c['clip'])
    with learn.no_bar(), learn.no_logging(): learn.fit(10**6, cbs=cbs)
    df = score_cases(Segmenter(learn.model.eval(), spec, .25), dls.valid_cases)
    return dict(data=data, choice=name, budget=budget_name(budget), fold=fold, seed=seed, dice=f'{df.dice.mean():.3f}', cases=' '.join(f'{k[-3:]}:{v:.3f}' for k,v in zip(df.case, df.dice)), patches=b.seen, cpu_seconds=f'{b.spent:.0f}',
        settings=json.dumps(choices[name]), **versions(), encoder=digest(name, encoder))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', default='.*'); p.add_argument('--seconds', type=float, default=300); p.add_argument('--patches', type=int); p.add_argument('--folds', default='0'); p.add_argument('--seeds', default='0'); p.add_argument('--encoder')
    p.add_argument('--phantoms', action='store_true'); p.add_argument('--out', type=Path, default=here.parent/'_bench')
    a = p.parse_args()
    budget = dict(patches=a.patches) if a.patches else dict(seconds=a.seconds)
    data,table = ('phantoms',seven_phantoms(a.out)) if a.phantoms else ('CT',seven_scans(a.out))
    for seed,fold,name in itertools.product(map(int, a.seeds.split(',')), map(int, a.folds.split(',')), choices):
        if not re.fullmatch(a.only, name) or name[0]=='*' and not a.encoder: continue
        if not done(path, data=data, choice=name, budget=budget_name(budget), fold=fold, seed=seed, encoder=digest(name, a.encoder)): add_row(path, run(data, table, name, fold, seed, budget, a.encoder))
