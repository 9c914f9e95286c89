"Training: rates group by group, fastai's verbs, and what is kept"
import json, math, os, signal, subprocess, sys

import fastai.metrics, numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientClip
from fastai.optimizer import SGD
from safetensors.torch import save_file

from covid3d.data import CaseReader
from covid3d.learner import (CTDataLoaders, CTSpec, KeepBest, PatchDice, ScanDice, encoder3d, mc3_18,
                             r2plus1d_18, r3d_18, segment, set_seed, train, unet_learner_3d)
from covid3d.weights import load_model, save_model
from covid3d.volume import CTError
from coarse import write_coarse

spec = CTSpec(spacing=(9,7,7), patch=(16,32,32))

@pytest.fixture(scope='module')
def table(tmp_path_factory): return write_coarse(tmp_path_factory.mktemp('data'), n=4, seed=1)

@pytest.fixture(scope='module')
def dls(table): return CTDataLoaders.from_table(table, spec, bs=2, patches=2)

def save_encoder(body, path, **net):
    "An encoder alone, with a note of how it is built, as a file of weights may hold it"
    save_file({k:v.contiguous() for k,v in body.state_dict().items()}, path, dict(covid3d=json.dumps(dict(net=net))))

def learner(dls, arch=r3d_18, **kw):
    set_seed(0, reproducible=True)
    return unet_learner_3d(dls, arch, pretrained=False, width=4, **kw)

@pytest.mark.parametrize('arch', [r3d_18, mc3_18, r2plus1d_18])
def test_each_group_moves_by_its_own_rate(dls, arch):
    "One step of plain SGD moves each parameter by −rate·gradient, with the rate of its group"
    learn = learner(dls, arch, opt_func=SGD)
    learn.create_opt(); learn.opt.set_hyper('mom', 0.); learn.opt.set_hyper('wd', 0.)
    rates = [10**-k for k in (6,5,4,3,2,1)]
    learn.opt.set_hyper('lr', rates)
    before = [[p.detach().clone() for p in g] for g in learn.opt.param_lists]
    x,y = dls.one_batch()
    learn.model.train(); learn.loss_func(learn.model(x), y).backward()
    grads = [[p.grad.clone() for p in g] for g in learn.opt.param_lists]
    learn.opt.step()
    assert len(learn.opt.param_lists)==6
    for rate,olds,gs,news in zip(rates, before, grads, learn.opt.param_lists):
        for old,g,new in zip(olds, gs, news): torch.testing.assert_close(new.detach(), old-rate*g, rtol=1e-4, atol=1e-6)
        assert any(g.abs().max()>0 for g in gs)

def test_fine_tune_freezes_then_frees(dls):
    "In the frozen epoch the encoder's convolutions stay as they are; afterwards they move"
    learn = learner(dls)
    conv = learn.model.encoder.layer4[0].conv1[0].weight
    start = conv.detach().clone()
    with learn.no_bar(), learn.no_logging():
        learn.freeze(); learn.fit_one_cycle(1, 1e-3)
        assert torch.equal(conv, start)
        learn.fine_tune(1, 1e-3, freeze_epochs=1)
    assert not torch.equal(conv, start) and all(p.requires_grad for p in learn.model.parameters())

def test_frozen_is_frozen(dls):
    "While the encoder waits nothing of it changes: weights, scale and shift, running statistics"
    learn = learner(dls)
    before = {k:v.clone() for k,v in learn.model.encoder.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.freeze(); learn.fit(1, 1e-2)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.encoder.state_dict().items())
    with learn.no_bar(), learn.no_logging(): learn.unfreeze(); learn.fit(1, 1e-2)
    assert not any(torch.equal(v, before[k]) for k,v in learn.model.encoder.state_dict().items() if 'shift' not in k)

@pytest.mark.parametrize('norm', ['batch','instance'])
def test_a_file_says_how_its_encoder_is_built(dls, tmp_path, norm):
    "Width and normalisation come from the file, and travel with the model"
    save_encoder(encoder3d(r3d_18, False, 8, norm), tmp_path/'e.safetensors', encoder='r3d_18', width=8, norm=norm)
    learn = unet_learner_3d(dls, pretrained=tmp_path/'e.safetensors')
    assert (learn.net.width,learn.net.norm)==(8,norm)
    save_model(learn.model, tmp_path/'m.safetensors', learn.spec, learn.net)
    again,_,net = load_model(tmp_path/'m.safetensors')
    assert net==learn.net and all(torch.equal(a, b) for a,b in zip(again.state_dict().values(), learn.model.state_dict().values()))
    assert unet_learner_3d(dls, pretrained=tmp_path/'m.safetensors').net==learn.net  # a whole model starts another

def test_gradients_are_clipped(dls):
    "No longer than `clip` when the optimiser steps"
    class Lengths(Callback):
        order = 100
        def before_fit(self): self.seen = []
        def before_step(self): self.seen.append(torch.cat([p.grad.flatten() for p in self.learn.model.parameters()]).norm().item())
    learn,lengths = learner(dls),Lengths()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4, cbs=lengths)
    free = max(lengths.seen)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4, cbs=[GradientClip(free/2), lengths])
    assert max(lengths.seen)<=free/2*1.001

def test_pretrained_starts_frozen(dls, tmp_path):
    "Weights from a file in torchvision's layout; all but the decoder wait"
    torch.save(r3d_18(weights=None).state_dict(), tmp_path/'r3d.pth')
    learn = unet_learner_3d(dls, r3d_18, pretrained=tmp_path/'r3d.pth')
    learn.create_opt()
    assert not learn.model.encoder.layer1[0].conv1[0].weight.requires_grad
    assert all(p.requires_grad for p in learn.opt.param_lists[-1])

def test_nan_never_replaces_good_weights(table, tmp_path):
    "Weights kept before the loss turned NaN stay on disk, and the learner ends with them"
    learn = train(table, tmp_path, spec=spec, init='random', width=4, epochs=1, patches=2, device='cpu')
    kept = (tmp_path/'model.safetensors').read_bytes()
    keep = KeepBest(tmp_path/'model.safetensors'); keep.best,keep.best_epoch = 2.,0
    with torch.no_grad(): next(learn.model.parameters()).fill_(float('nan'))
    with learn.no_bar(), learn.no_logging():
        learn.metrics = [PatchDice(), Constant()]
        learn.fit(1, 0., cbs=keep)
    assert (tmp_path/'model.safetensors').read_bytes()==kept
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())

class Constant(ScanDice):
    "A whole-scan Dice that could not be computed"
    @property
    def value(self): return math.nan

def test_classes_are_a_list(table):
    "Two overlapping classes train as one does: a channel and a mask each"
    two = CTSpec(spacing=(9,7,7), patch=(16,32,32), classes=('lesion','lung'))
    dls = CTDataLoaders.from_table(table, two, bs=2, patches=2)
    learn = learner(dls)
    x,y = dls.one_batch()
    assert learn.model(x).shape==y.shape==(2,2,16,32,32)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert math.isfinite(learn.recorder.values[-1][0])

@pytest.mark.parametrize('method', ['fork','spawn'])
def test_worker_processes(table, method):
    "Batches come through worker processes as without them"
    usual = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method(method, force=True)
    try: x,y = next(iter(CTDataLoaders.from_table(table, spec, bs=2, patches=2, num_workers=1).train))
    finally: torch.multiprocessing.set_start_method(usual, force=True)
    assert x.shape==y.shape==(2,1,16,32,32) and 0<=x.min()<=x.max()<=1

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_fp16_on_a_gpu(table):
    dls = CTDataLoaders.from_table(table, spec, bs=2, patches=2, device='cuda')
    learn = learner(dls).to_fp16()
    learn.fit(1, 1e-3)
    assert math.isfinite(learn.recorder.values[-1][0])

def test_frozen_and_free_epochs_in_one_table(table, tmp_path):
    "From weights of a file: the frozen epoch and the others are one table, and the best of all is kept"
    import pandas as pd
    save_file({k:v.contiguous() for k,v in encoder3d(r3d_18, pretrained=False, width=4).state_dict().items()}, tmp_path/'encoder.safetensors')
    learn = train(table, tmp_path/'run', spec=spec, init=tmp_path/'encoder.safetensors', width=4, epochs=2, frozen_epochs=1, patches=2, score_every=1, device='cpu')
    h = pd.read_csv(tmp_path/'run'/'history.csv')
    assert h.epoch.tolist()==[0,1,2]
    assert learn.kept.best==pytest.approx(h.scan_dice.max())

def test_nan_loss_is_said(table, tmp_path, capfd):
    "A learning rate far too high: status 2, one line with the way out"
    from covid3d.cli import main
    assert main(['train',str(table),'--out',str(tmp_path/'run'),'--init','random','--width','4','--spacing','9,7,7','--patch','16,32,32','--patches','4','--epochs','2','--lr','1e30','--device','cpu'])==2
    err = capfd.readouterr().err
    assert err.count('\n')==1 and 'lower' in err and 'covid3d train' in err

@pytest.mark.parametrize('ratio,stages', [(1.,0),(5.,2),(3.,5)])
def test_early_stages_stay_and_rates_rise(table, tmp_path, ratio, stages):
    "Frozen stages keep weights and running statistics; the others and the decoder move, each group by its rate"
    enc = encoder3d(r3d_18, False, 4)
    save_encoder(enc, tmp_path/'e.safetensors', encoder='r3d_18', width=4, norm='batch')
    learn = train(table, tmp_path/'run', spec=spec, init=tmp_path/'e.safetensors', epochs=1, frozen_epochs=0, patches=2, examples=0, lr_ratio=ratio, frozen_stages=stages)
    rates = [h['lr'] for h in learn.opt.hypers]
    assert rates==sorted(rates) and math.isclose(rates[-1]/rates[0], ratio, rel_tol=1e-6)
    for i,(old,new) in enumerate(zip(enc.children(), learn.model.encoder.children())):
        same = [torch.equal(a, b) for a,b in zip(old.state_dict().values(), new.state_dict().values()) if a.numel()>1]
        assert all(same) if i<stages else not same[0]  # the first is a convolution's weights

def test_stages_that_are_not_there(table, tmp_path):
    with pytest.raises(CTError, match='frozen_stages: 6 is not in 0…5. Give 2 for the stem and layer 1, 0 for none'): train(table, tmp_path/'run', spec=spec, frozen_stages=6)

def test_average_follows_steps_not_batches(dls):
    "Gradients of two batches added up to one step: the average moves once a step"
    from fastai.callback.training import GradientAccumulation
    from covid3d.learner import EMA
    def seen(*cbs):
        ema,learn = EMA(.9),learner(dls)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=[ema, *cbs])
        return ema.n
    n = len(dls.train)
    assert n>1 and (seen(),seen(GradientAccumulation(2*dls.train.bs)))==(n,n//2)

@pytest.mark.promise('silent')
def test_predict_segments_the_whole_scan(table, dls, tmp_path):
    "learn.predict of a case, a volume or a path gives the masks of the whole scan on its own grid, those of covid3d predict; fastai's would be those of a patch from its middle"
    learn,case = learner(dls),dls.valid_cases[0]
    ct = case.open_ct()
    want = segment(learn.model, spec, ct)  # what a Segmenter calls
    for scan in (case, ct, case.ct, str(case.ct)):
        got = learn.predict(scan).masks
        assert got.keys()==want.keys()=={'lesion'} and got['lesion'].dtype==np.uint8 and (got['lesion']==want['lesion']).all() and got['lesion'].shape==ct.shape
    with pytest.raises(CTError, match='no such file'): learn.predict(tmp_path/'none.nii.gz')

@pytest.mark.promise('silent')
@pytest.mark.parametrize('name', ['Dice','DiceMulti','JaccardCoeff','JaccardCoeffMulti','foreground_acc','accuracy'])
def test_metrics_that_would_always_be_zero_are_refused(dls, name):
    "A metric of fastai's that compares channels gives 0 for masks of one channel: it is refused, at once and when it is set later"
    f = getattr(fastai.metrics, name)
    for m in (f, *([f()] if isinstance(f, type) else [])):
        with pytest.raises(CTError, match=f'metrics: {name} of fastai .*Use PatchDice'): learner(dls, metrics=[PatchDice(), m])
    learn = learner(dls, metrics=[fastai.metrics.accuracy_multi, fastai.metrics.rmse])
    with pytest.raises(CTError, match='Use PatchDice'): learn.metrics = f

@pytest.mark.promise('silent')
def test_no_augmentation_is_not_guessed(table, tmp_path):
    "aug=None is refused: it once meant the full augmentation, where readers expect the default or none"
    with pytest.raises(CTError, match='augment: None is unknown. Give none, light, full'): train(table, tmp_path/'run', spec=spec, init='random', augment=None)
    assert not (tmp_path/'run').exists()

tiny = dict(init='random', width=4, epochs=1, patches=2, examples=0, device='cpu')

def in_worker(monkeypatch, do):
    "`do` is called where a process draws its first patch"
    plain = CaseReader.__call__
    def call(self, case):
        if torch.utils.data.get_worker_info() is not None: do()
        return plain(self, case)
    monkeypatch.setattr(CaseReader, '__call__', call)

@pytest.mark.fault('X8')
def test_X8_a_killed_worker_names_the_case(table, tmp_path, monkeypatch):
    "A process that draws patches is killed, as the system does when memory runs out: the cases, and the way out"
    in_worker(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(CTError, match='workers: a process that draws patches was killed, while patches of phantom_00.* were awaited.*--workers 0'): train(table, tmp_path/'run', spec=spec, workers=1, **tiny)
    assert not list((tmp_path/'run').rglob('.*'))

@pytest.mark.fault('X9')
def test_X9_little_shared_memory(table, tmp_path, monkeypatch):
    "What PyTorch says of a small /dev/shm, in one line with the way out"
    def full(): raise RuntimeError('unable to write to file </torch_71_1>: No space left on device (28)')
    in_worker(monkeypatch, full)
    with pytest.raises(CTError, match=r'workers: the shared memory \(/dev/shm\) is too small .* phantom_00.*--workers 0'): train(table, tmp_path/'run', spec=spec, workers=1, **tiny)

def test_a_bad_case_in_a_worker_is_one_line(table, tmp_path, monkeypatch):
    def damaged(): raise CTError('case_1/ct.npy', 'is damaged', 'Prepare it again')
    in_worker(monkeypatch, damaged)
    with pytest.raises(CTError, match='^case_1/ct.npy: is damaged. Prepare it again. Then add --resume.$'): train(table, tmp_path/'run', spec=spec, workers=1, **tiny)

def test_the_program_ends_after_an_error_in_a_worker(table, tmp_path):
    "Worker processes do not hear SIGTERM while a training runs; afterwards they must, or multiprocessing waits for them without end"
    code = f"""
from covid3d.all import *
from covid3d.data import CaseReader
import torch
plain = CaseReader.__call__
def call(self, case):
    if torch.utils.data.get_worker_info() is not None: raise RuntimeError('odd')
    return plain(self, case)
CaseReader.__call__ = call
try: train({str(table)!r}, {str(tmp_path/'run')!r}, spec=CTSpec(**{dict(spacing=(9,7,7), patch=(16,32,32))!r}), workers=2, init='random', net=NetSpec(width=4), epochs=1, patches=4, bs=2, device='cpu')
except Exception as e: kept = e; print('failed:', e)
"""
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=240)
    assert 'failed:' in res.stdout and 'odd' in res.stdout, res.stdout+res.stderr

@pytest.mark.fault('X10')
@pytest.mark.parametrize('text', ['CUDA out of memory. Tried to allocate 2.00 GiB', "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate"])
def test_X10_memory_that_does_not_suffice(table, tmp_path, text):
    "The setting that fits is one option away; a setting that is known to fit is what memory=… chooses (test_memory.py)"
    class Full(Callback):
        def after_pred(self): raise RuntimeError(text)
    with pytest.raises(CTError, match='memory: a training step needs more than there is. Start anew with less: --memory, such as 6GB, or a smaller --bs or --patch'): train(table, tmp_path/'run', spec=spec, cbs=[Full()], **tiny)

def test_other_errors_stay_themselves(table, tmp_path):
    class Odd(Callback):
        def after_pred(self): raise RuntimeError('of another kind')
    with pytest.raises(RuntimeError, match='of another kind'): train(table, tmp_path/'run', spec=spec, cbs=[Odd()], **tiny)

@pytest.mark.promise('lost')
def test_a_picture_that_cannot_be_drawn_ends_nothing(table, tmp_path, monkeypatch, capsys):
    "Whatever goes wrong while a picture is drawn, the training continues"
    def odd(*_): raise RuntimeError('latex could\nnot be found')
    monkeypatch.setattr('covid3d.show.save_figure', odd)
    train(table, tmp_path/'run', spec=spec, plot=True, **tiny|dict(examples=1))
    assert 'no picture of this epoch: latex could not be found' in capsys.readouterr().out and (tmp_path/'run'/'model.safetensors').exists()
