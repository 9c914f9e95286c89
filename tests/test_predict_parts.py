"The parts of `covid3d.predict`, each with values worked by hand"
import errno, os
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch

from covid3d.cases import Case
from covid3d.phantom import phantom
from covid3d.inference import Segmenter
from covid3d.predict import _as_error, _check_format, _claim, _is_done, _labels, _line, _mask_digest, _names, _of_all, _read_rows, _Record, _unlike, _writers, unmeasured
from covid3d.transforms import CTSpec
from covid3d.volume import CTError, Scarce
from covid3d.weights import NetSpec, Seen, save_model

benchmarks = Path(__file__).resolve().parent.parent/'benchmarks'

def test_labels():
    some = {k:np.array(v, np.uint8) for k,v in dict(lesion=[0,1,0,0], right_lung=[1,1,0,0], left_lung=[1,0,1,0]).items()}
    assert [*_labels({k:some[k] for k in ('right_lung','left_lung')})]==[2,1,2,0] and [*_labels(some)]==[2,3,2,0]

def test_names_of_files():
    "No two files are one, none replaces an input, none has the name of a table"
    two = [Case('a', Path('a.nii.gz')), Case('a_lesion', Path('a_lesion.nii.gz'))]
    named = lambda cases, *classes: _names(cases, _writers(classes), Path('.'))
    assert len(named(two, 'lung'))==2
    with pytest.raises(CTError, match="'a' and one of 'a_lesion' would be"): named(two, 'b', 'lesion_b')
    with pytest.raises(CTError, match='would be the same'): named([Case('a', Path('a.nii')), Case('A', Path('A.nii'))], 'b')
    with pytest.raises(CTError, match='longer than 255'): named([Case('a'*250, Path('a.nii'))], 'b')
    with pytest.raises(CTError, match='one of the inputs'): named(two, 'lesion')
    for o in ('covid3d','index','Index-2'):
        with pytest.raises(CTError, match='about all scans'): named([Case(o, Path('a.nii'))], 'lesion', 'right_lung', 'left_lung')
    with pytest.raises(CTError, match='was not read from DICOM'): _check_format(two, 'seg')
    with pytest.raises(CTError, match="'jpeg' is unknown"): _check_format(two, 'jpeg')

def test_digest_of_weights(tmp_path):
    "The same under another name, another with other weights or settings"
    spec,net = CTSpec(spacing=(12,8,8), patch=(16,48,48)),NetSpec(width=4)
    torch.manual_seed(0)
    model = net.build(spec.classes)
    for o in ('model','copy'): save_model(model, tmp_path/f'{o}.safetensors', spec, net)
    one,same = (Segmenter.load(tmp_path/f'{o}.safetensors').digest for o in ('model','copy'))
    assert one==same and Segmenter(net.build(spec.classes), spec).digest!=one
    assert Segmenter(model, CTSpec(spacing=(12,8,8.1), patch=(16,48,48))).digest!=one

def test_table_of_scans(tmp_path):
    "The last row of a scan counts, and a line that was cut off does not"
    table = _Record(tmp_path, ('lesion',))
    for ml in (1., 2.): table.add(dict(scan='chest', source='=chest.nii.gz', lesion_ml=ml))
    with table.path.open('a') as f: f.write('chest,cut')
    assert _read_rows(table.path)['chest']['source']=='=chest.nii.gz'
    if os.name!='nt': assert table.path.stat().st_mode&0o777==0o600
    assert len(_Record(tmp_path, ('lung',)).path.read_text().splitlines())==2
    (tmp_path/'other.csv').write_text('a,b\n1,2\n')
    with pytest.raises(CTError, match='not a table of scans'): _read_rows(tmp_path/'other.csv')

def test_what_is_done(tmp_path):
    (tmp_path/'a_lesion.nii.gz').write_bytes(b'mask')
    of_a = dict(digest='1', grid='2', weights='3', settings='4')
    old = of_a|dict(masks='a_lesion.nii.gz', written=_mask_digest(tmp_path/'a_lesion.nii.gz'))
    there = lambda old, overwrite=False, **change: _is_done(old, of_a|change, ['a_lesion.nii.gz'], tmp_path, overwrite)
    assert [there(None), there(old), there(old|dict(written='')), there(old, True, weights='5')]==[False,True,False,False]
    with pytest.raises(CTError, match='changed since'): there(old|dict(written='other'))
    assert not there(old|dict(written='other'), True)
    for o in (False,True):
        with pytest.raises(CTError, match='to another scan'): there(old, o, digest='6')
    assert not _is_done(old, of_a, ['a_lesion.nii.gz','a_lung.nii.gz'], tmp_path, False)

def test_files_of_all_scans(tmp_path):
    for k in ('index-2.html','index-mine.html'): (tmp_path/k).touch()
    assert _of_all(tmp_path, ['.json'])==['measurements.csv','index-2.html'] and _of_all(tmp_path, ['_lesion.nii.gz'])==[]
    with pytest.raises(CTError, match='index-2.html: is there already'): _claim(tmp_path, {}, {}, False, ['.json'])

def test_more_lesion_than_training_held():
    ct = phantom(0, shape=(32,96,96), spacing=(9.,3.7,3.7)).ct
    little = np.zeros(ct.shape, np.uint8); little[10,40:44,40:44] = 1
    assert _unlike(dict(lesion=little), ct, [Seen(12, 551., .06)])==[]==_unlike(dict(lesion=little), ct, [None])
    assert _unlike(dict(lesion=np.ones(ct.shape, np.uint8)), ct, [Seen(3, 0., 0.)])==[]
    assert len(_unlike(dict(lesion=little), ct, [Seen(3, .1, 0.)]))==1
    all_body = dict(lesion=np.ones(ct.shape, np.uint8))
    w, = _unlike(all_body, ct, [Seen(3, 0., .004)])
    assert w.startswith('warning: the lesion is 100% of the body, where training held 0.4% at most: ')

def test_errors_as_lines():
    case = Case('scan_8b2f0c61d7', Path('archive/DOE^JANE'))
    assert _line(CTError('out/scan_x', 'cannot be written', 'Check it'), case)=='scan_8b2f0c61d7: out/scan_x: cannot be written. Check it.'
    assert _line(CTError('a.nii', 'cut', 'Copy it'), Case('a', Path('a.nii')))=='a: cut. Copy it.'
    full = _as_error(OSError(errno.EMFILE, 'Too many open files'), case)
    assert 'ulimit -n' in str(full) and isinstance(full, Scarce)
    assert 'RuntimeError: odd' in str(_as_error(RuntimeError('odd'), case))

def test_what_weights_without_lungs_miss():
    assert unmeasured(('right_lung','left_lung','lesion'))=='' and 'report' not in unmeasured(('lesion',))
    assert unmeasured(('lesion',), 'seg').endswith('NAME_seg.dcm') and 'no report' in unmeasured(('lesion',), 'seg')

def test_what_is_said_of_speed_and_memory():
    "The line on memory that `covid3d predict` prints, and what the chapter says, are what benchmarks/ measured"
    of = pd.read_csv(benchmarks/'inference.csv').set_index(['way','slices'])
    assert of.peak_mb['covid3d',1000]<4000<of.peak_mb['MONAI',1000]
    for n in (148,300,1000): assert .8<(1e9+10*512*512*n)/1e6/of.peak_mb['covid3d',n]<1.25
    assert all(of.seconds['covid3d',n]<of.seconds['MONAI',n] for n in (148,300,1000))
    mean = pd.read_csv(benchmarks/'inference_dice.csv').set_index('case').loc['mean']
    assert mean['covid3d']>mean['MONAI']
    ways = pd.read_csv(benchmarks/'runtimes.csv').set_index('way')
    assert all(ways.scan_s['eager']-ways.scan_s[ways.apart<=.001]<.25) and 50<ways.start_s['compiled']<60
