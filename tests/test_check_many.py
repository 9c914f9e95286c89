"The check of a large cohort: bounded memory, the table's order, the same result on any number of threads, and quiet output"
import json, threading, tracemalloc, weakref

import numpy as np, pandas as pd, pytest

import covid3d.cases as cases
from covid3d.cases import Case, check_cases, check_table, report_json
from covid3d.cli import main
from nifti_bytes import chest
from covid3d.volume import Volume, canonical_affine, save_volume

shape = (4,10,10)

@pytest.fixture(scope='module')
def thousand(tmp_path_factory, no_fsync):
    "1,000 tiny scans, each with values of its own; every seventh has an empty mask, every hundredth is damaged"
    root = tmp_path_factory.mktemp('thousand')
    affine,rng = canonical_affine((5,3,3)),np.random.default_rng(0)
    mask = np.zeros(shape, np.uint8); mask[1:3,2:5,2:5] = 1
    for m,k in ((mask,'lesion'),(mask*0,'empty')): save_volume(Volume(m, affine), root/f'{k}.nii')
    rows = []
    for i in range(1000):
        x = rng.integers(-1000, 400, shape).astype(np.int16); x[0,0,:2] = i,-1000
        save_volume(Volume(x, affine), root/f'{i}.nii')
        if i%100==50: (root/f'{i}.nii').write_bytes(b'damaged')
        rows.append(dict(case=f'c{i:04d}', ct=f'{i}.nii', lesion='empty.nii' if i%7==3 else 'lesion.nii', split='train'))
    pd.DataFrame(rows).to_csv(root/'cases.csv', index=False)
    return root/'cases.csv'

class Census:
    "How many scans are alive at once, and how many threads open them"
    def __init__(self, monkeypatch):
        self.alive,self.most,self.total,self.threads,self.lock = 0,0,0,set(),threading.Lock()
        real = Case.open_ct
        def open_ct(case):
            vol = real(case)
            with self.lock: self.alive += 1; self.total += 1; self.most = max(self.most, self.alive); self.threads.add(threading.get_ident())
            weakref.finalize(vol.data.base if vol.data.base is not None else vol.data, self.gone)
            return vol
        monkeypatch.setattr(Case, 'open_ct', open_ct)
    def gone(self):
        with self.lock: self.alive -= 1

@pytest.mark.parametrize('workers', [1,3,None])
def test_no_more_scans_than_threads(thousand, monkeypatch, workers):
    "A report that held on to its scan, or a queue of opened ones, would show here"
    census = Census(monkeypatch)
    monkeypatch.setattr('os.cpu_count', lambda: 64)
    reports = check_table(thousand, workers=workers)
    workers = workers or 2  # whatever the number of processors
    assert len(reports)==1000 and census.total==990 and census.most<=workers and census.alive==0 and len(census.threads)<=workers

def test_peak_of_memory(tmp_path, no_fsync):
    "40 scans of 1 MB: no more than a few of them at a time"
    affine = canonical_affine((5,3,3))
    x = np.ascontiguousarray(chest((256,256,8)).transpose(2,1,0))
    for i in range(40): x[0,0,0] = i; save_volume(Volume(x, affine), tmp_path/f'{i}.nii')
    pd.DataFrame([dict(case=f'c{i}', ct=f'{i}.nii') for i in range(40)]).to_csv(tmp_path/'t.csv', index=False)
    check_table(tmp_path/'t.csv', workers=2)  # what is loaded once
    tracemalloc.start()
    reports = check_table(tmp_path/'t.csv', workers=2)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert len(reports)==40 and peak<2*6*x.nbytes, f'{peak/x.nbytes:.1f} scans'

def test_order_and_threads(thousand):
    "In the order of the table, and the same on 1 and 4 threads"
    one,four = (check_table(thousand, workers=n) for n in (1,4))
    assert [r.case for r in four]==[f'c{i:04d}' for i in range(1000)] and one==four
    d = report_json(four)
    assert (d['ok'],d['cases'],d['errors'],d['warnings'],d['notes'])==(False,1000,10,0,sum(i%7==3 and i%100!=50 for i in range(1000)))
    assert [r.case for r in four if not r.ok]==[f'c{i:04d}' for i in range(50, 1000, 100)]

def test_threads_work_at_once(thousand, monkeypatch):
    "Two cases wait for each other, which one thread could not do"
    meet = threading.Barrier(2, timeout=20)
    monkeypatch.setattr(cases, '_check_files', lambda rep, case, need: meet.wait())
    assert len(check_cases(cases.read_cases(thousand)[:2], workers=2))==2

def test_duplicates_far_apart(thousand, tmp_path):
    df = pd.read_csv(thousand, dtype=str)
    df['ct'] = [str(thousand.parent/o) for o in df.ct]; df['lesion'] = [str(thousand.parent/o) for o in df.lesion]
    (tmp_path/'copy.nii').write_bytes((thousand.parent/'1.nii').read_bytes())
    df.loc[998,['ct','split']] = str(tmp_path/'copy.nii'),'test'
    found = [f for r in check_table(df.iloc[[0,1,2,996,997,998]].reset_index(drop=True), workers=3) for f in r.findings if f.level=='error']
    assert [(f.case,'c0001' in f.fault) for f in found]==[('c0998',True)]

def test_output_is_clean(thousand, tmp_path, capfd):
    "Not a terminal: no bar, no escape codes, and JSON that is nothing else; a line a case for a person"
    assert main(['check',str(thousand),'--json'])==1
    out = capfd.readouterr()
    assert json.loads(out.out)['cases']==1000 and out.err==''
    table = thousand.with_name('some.csv'); table.write_text(''.join(thousand.read_text().splitlines(True)[:101]))
    assert main(['check',str(table)])==1
    out = capfd.readouterr()
    assert out.err=='' and not {'\r','\x1b','█'}&{*out.out} and out.out.splitlines()[-1].startswith('100 cases · 1 error, 0 warnings')
    assert sum(o.lstrip().startswith('c0') for o in out.out.splitlines())==100
