"""Random damage to one file of a valid series: refused by CTError, or read as SimpleITK reads the same bytes; never a crash, a hang, or memory without end.
What the other files of the series contradict is refused or noted: a changed header alone never changes geometry or voxels in silence.
COVID3D_FUZZ=2000 tries that many in all, classic, enhanced and compressed in turn.

A child process, which runs this file, opens the damaged series under a limit of memory and a clock: a decoder that takes the process down, or loops, fails the test, and so does SimpleITK if it does."""
import faulthandler, json, os, re, resource, subprocess, sys, warnings
from pathlib import Path

import numpy as np, pydicom, pytest

sys.path.insert(0, str(Path(__file__).parent))
from covid3d.dicom import find_series, open_series
from covid3d.volume import CTError
from dicom_files import encode, enhanced, in_file_order, native, packed, save_all, scan, sets_of, slice_by_slice

kinds = [*native, *packed, 'enhanced', 'enhanced_frames', 'enhanced_j2k']
count = -(-int(os.environ.get('COVID3D_FUZZ', 120))//len(kinds))  # of each kind
seconds,memory,growth = 20,2*2**30,300*2**20
extremes = [bytes(4), b'\xff'*4, b'\xff\xff\xff\x7f', b'\xff\xff\0\0', b'\0\0\0\x80', b'\xfe\xff\xdd\xe0', b'\xfe\xff\0\xe0']  # the last two are the delimiters of sequences

def series(kind)->list:
    "Datasets of a small series, a file each"
    sets = sets_of(scan((5,24,20)))
    if kind in native|packed: return [encode(o, (native|packed)[kind]) for o in sets]
    return [encode(enhanced(sets, kind=='enhanced_frames'), packed['j2k'] if kind=='enhanced_j2k' else native['little'])]

def damage(raw, pixels, rng)->bytes:
    "One to three changes, most of them before byte `pixels`: a bit, a byte, a run of bytes, an extreme number, a cut, a piece left out or put in"
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        at,n = int(rng.integers(min(pixels if rng.random()<.7 else len(raw), len(raw)) or 1)),int(rng.integers(1, 9))
        match rng.integers(8):
            case 0 | 1: raw[at:at+1] = bytes([raw[at]^(1<<int(rng.integers(8)))]) if raw else b''
            case 2: raw[at:at+1] = rng.bytes(1)
            case 3: raw[at:at+n] = rng.bytes(n)
            case 4: raw[at:at+4] = extremes[int(rng.integers(len(extremes)))]
            case 5: del raw[at:at+n if rng.random()<.7 else len(raw)]
            case 6: raw[at:at] = rng.bytes(n)
            case 7: raw[at:at] = raw[at:at+int(rng.integers(1, 200))]
    return bytes(raw)

def by_pydicom(vol)->tuple:
    "As `slice_by_slice`, with pydicom's reader and decoders"
    read,xs,at = {},[],[]
    for s in vol.source.slices:
        if s.path not in read: ds = pydicom.dcmread(s.path); read[s.path] = ds,ds.pixel_array.reshape(-1, ds.Rows, ds.Columns)
        ds,x = read[s.path]
        groups = [ds.PerFrameFunctionalGroupsSequence[s.frame],ds.SharedFunctionalGroupsSequence[0]] if 'SharedFunctionalGroupsSequence' in ds else []
        part = lambda name: next((g[name][0] for g in groups if name in g), ds)
        rescale = part('PixelValueTransformationSequence')
        xs.append(x[s.frame]*float(rescale.RescaleSlope)+float(rescale.RescaleIntercept)); at.append([float(o) for o in part('PlanePositionSequence').ImagePositionPatient])
    return np.clip(xs, -1024, 32767),np.array(at)

def compare(vol)->str:
    "What differs from another reader, nothing if all is equal. Frames with a rescale of their own are pydicom's to judge: GDCM takes the first frame's for all"
    own = len({(s.slope,s.intercept) for s in vol.source.slices if s.frames>1})>1
    try: voxels,at = (by_pydicom if own else slice_by_slice)(vol)
    except RuntimeError: return 'SimpleITK refuses'
    if voxels.shape!=in_file_order(vol).shape: return f'shape {voxels.shape}'
    if not np.allclose(in_file_order(vol), voxels, rtol=1e-6, atol=1e-3): return f'voxels by {abs(in_file_order(vol)-voxels).max():g}'
    if not np.allclose(at, [s.position for s in vol.source.slices], atol=1e-3): return 'positions'
    return ''

def corners(vol)->np.ndarray:
    "Where the corners of a volume lie, mm"
    return (vol.affine@np.array([[i*n for i,n in zip(o, np.array(vol.shape)-1)]+[1] for o in np.ndindex(2,2,2)]).T)[:3]

def changed(vol, base, headers_only)->str:
    "What a damaged file changed in silence although the other files of its series contradict it"
    if vol.notes!=base.notes: return ''
    if vol.shape!=base.shape or abs(corners(vol)-corners(base)).max()>.2: return 'geometry changed in silence'
    same = [(vol.data[i]==base.data[i]).all() for i in range(len(vol.data))]
    if sum(same)<len(same)-(not headers_only): return 'voxels changed in silence'
    return ''

def attempt(folder, stage, base=None, headers_only=False)->str:
    "One damaged series: refused, equal, noted, or what is wrong; `base` is the sound series, if it has several files"
    stage.write_text('ours'); faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        try: vol = open_series(folder)
        except CTError as e: return 'refused' if re.fullmatch(rf'{re.escape(str(folder))}[^\n:]*: [^\n]+\.', str(e)) and not re.search('DOE|JANE', str(e)) else f'message {e}'
        if re.search('DOE|JANE', str(vol.notes)): return f'notes {vol.notes}'
        if base and (fault := changed(vol, base, headers_only)): return fault
        stage.write_text('SimpleITK')
        return compare(vol) or ('noted' if vol.notes else 'equal')
    except Exception as e: return f'{type(e).__name__}: {e}'
    finally: faulthandler.cancel_dump_traceback_later()

def child(kind, folder, start, stop):
    "Damage number `start` to `stop`; a line of JSON after each"
    warnings.simplefilter('error'); resource.setrlimit(resource.RLIMIT_AS, (memory,memory))
    files,rng = sorted((folder/'series').iterdir()),np.random.default_rng(kinds.index(kind))
    whole = [(p, p.read_bytes()) for p in files]
    base = open_series(folder/'series') if len(files)>1 else None
    at = {s.path:s.at for o in find_series(folder/'series') for s in o.slices}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(start, stop):
        rng = np.random.default_rng([kinds.index(kind), i])
        p,raw = whole[int(rng.integers(len(whole)))]
        bad = damage(raw, at[p]+16, rng)
        p.write_bytes(bad)
        res = attempt(folder/'series', folder/'stage', base, bad.endswith(raw[at[p]:]))
        if (now := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)*1024>peak*1024+growth: res = f'memory grew from {peak>>10} to {now>>10} MiB'
        print(json.dumps([i, res]), flush=True)
        p.write_bytes(raw)
    print(json.dumps(['peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss>>10]), flush=True)

def run(kind, folder)->list:
    "What came of each damage"
    save_all(series(kind), folder/'series')
    res,start,peaks = [],0,[]
    while start<count:
        p = subprocess.run([sys.executable,__file__,kind,str(folder),str(start),str(count)], capture_output=True, text=True, errors='replace')
        assert not re.search('DOE|JANE', p.stderr+p.stdout), p.stderr[-2000:]
        new = [json.loads(o) for o in p.stdout.splitlines()]
        peaks += [o for i,o in new if i=='peak']; new = [o for i,o in new if i!='peak']; res += new; start += len(new)
        if p.returncode==0: break
        assert (folder/'stage').read_text()=='SimpleITK', f'damage {start} of {kind} ended the process:\n{p.stderr[-3000:]}'
        res.append('SimpleITK died'); start += 1
        save_all(series(kind), folder/'series')
    return res,max(peaks, default=0)

@pytest.mark.parametrize('kind', kinds)
@pytest.mark.fault('C21','C15')
@pytest.mark.promise('silent')
def test_damaged(tmp_path, kind, no_fsync):
    "DICOM with random damage is refused in one line, or read as another reader reads it; what the other slices contradict is not read in silence"
    res,peak = run(kind, tmp_path)
    odd = {i:o for i,o in enumerate(res) if o not in ('refused','equal','noted')}
    print(kind, {k:res.count(k) for k in ('refused','equal','noted')}, f'peak {peak} MiB')
    assert not odd
    assert len(res)==count and res.count('refused')>count//10  # not everything is taken …
    assert count<50 or res.count('equal')>count//20  # … nor everything refused

if __name__=='__main__': child(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
