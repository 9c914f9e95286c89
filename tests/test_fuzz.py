"""Random damage to a valid file: refused by CTError, or read as nibabel reads it; never another exception. COVID3D_FUZZ=10000 tries so many files.

No file takes longer than 10 s, all together grow the process by less than 2 GB, and no geometry changes where the file's size, a checksum or a second field of the header could tell.

In a packed file the checksum covers every voxel, so damage is refused unless it hits bytes of the gzip header that carry no data."""
import gzip, os, signal, sys, zlib
import nibabel as nib, numpy as np, pytest
from covid3d.volume import CTError, open_ct, open_mask, save_mask
from nifti_bytes import chest, formats, hu, nifti, patch, peek, sizes

count = int(os.environ.get('COVID3D_FUZZ', 600))  # files, over all tests that draw at random

pytestmark = [pytest.mark.usefixtures('no_fsync', 'bounded'), pytest.mark.fault('D1','D2','H18')]

def peak()->int:
    "The most memory this process has held, in bytes; 0 where that is not told"
    try: import resource
    except ImportError: return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform=='darwin' else 1024)

@pytest.fixture(scope='module')
def bounded():
    before = peak()
    yield
    assert peak()-before<2e9

def late(*args): raise AssertionError('longer than 10 s')

def damage(raw, rng, end=None)->bytes:
    "One to three changes: a bit, a byte, a run of bytes, a cut, a piece left out or put in"
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(min(end or len(raw), len(raw)) or 1))
        n = int(rng.integers(1, 9))
        match rng.integers(7):
            case 0 | 1: raw[at:at+1] = bytes([raw[at]^(1<<int(rng.integers(8)))]) if raw else b''
            case 2: raw[at:at+1] = rng.bytes(1)
            case 3: raw[at:at+n] = rng.bytes(n)
            case 4: raw[at:at+4] = [bytes(4), b'\xff'*4, b'\0\0\xc0\x7f', b'\0\0\x80\x7f', b'\xff\xff\xff\x7f'][int(rng.integers(5))]
            case 5: del raw[at:at+n if rng.random()<.5 else len(raw)]
            case 6: raw[at:at] = rng.bytes(n)
    return bytes(raw)

def opened(path, opener=open_ct):
    "The volume, or None where it was refused as it should be"
    clock = hasattr(signal, 'SIGALRM')
    if clock: signal.signal(signal.SIGALRM, late); signal.alarm(10)
    try: return opener(path)
    except CTError as e: assert str(e).startswith(f'{path}: ') and '\n' not in str(e)
    finally:
        if clock: signal.alarm(0)

def check_gz(path, raw, want):
    "Equal to the undamaged file, and then the damage was only in the gzip header"
    path.write_bytes(raw)
    vol = opened(path)
    if vol is None: return 0
    assert np.array_equal(vol.data, want.data) and np.array_equal(vol.affine, want.affine)
    return 1

@pytest.mark.parametrize('level', [0, 6])
def test_packed(tmp_path, level):
    path,rng = tmp_path/'scan.nii.gz',np.random.default_rng(level)
    whole = gzip.compress(nifti(hu()), level, mtime=0); path.write_bytes(whole)
    want,survivors = open_ct(path),0
    for _ in range(count//5):
        raw = damage(whole, rng)
        ok = check_gz(path, raw, want)
        survivors += ok
    assert survivors<max(count//20, 2)

def unpacked(raw):
    try: return zlib.decompress(raw, 31)
    except zlib.error: pass

@pytest.mark.parametrize('level', [0, 6])
def test_every_byte_of_a_packed_file(tmp_path, level):
    "One flipped bit at each place: all are refused but mtime, XFL, OS, unused flags (RFC 1952, 2.3), and bits that zlib unpacks to the same bytes"
    path,rng = tmp_path/'scan.nii.gz',np.random.default_rng(level)
    whole = gzip.compress(nifti(hu((5,4,4))), level, mtime=0); path.write_bytes(whole)
    want = open_ct(path)
    for at in range(len(whole)):
        raw = bytearray(whole); raw[at] ^= 1<<int(rng.integers(8))
        ok = check_gz(path, bytes(raw), want)
        assert at==3 or ok==(unpacked(raw)==gzip.decompress(whole))

def accounted(raw, vol):
    "The file's size and each second field of the header agree with what was opened, or a note says that they do not"
    hdr = vol.source.header
    rest = len(raw)-int(hdr['vox_offset'])-vol.data.size*hdr.get_data_dtype().itemsize
    assert rest==0 or 0<rest<=512 and not any(raw[-rest:]) and any('zero bytes follow' in o for o in vol.notes)
    unit = {1:1000,3:.001}.get(int(hdr['xyzt_units'])&7, 1)
    pix = abs(hdr['pixdim'][1:4].astype(float))*unit
    assert np.allclose(np.sort(vol.spacing), np.sort(pix), rtol=.011) or any('the header gives the spacing' in o for o in vol.notes)
    if hdr['sform_code']>0 and hdr['qform_code']>0:
        apart = abs(hdr.get_sform()-hdr.get_qform())[:3,3].max()*unit
        assert apart<=.5*max(vol.spacing)+1e-3

def check_nii(path, raw, opener):
    path.write_bytes(raw)
    vol = opened(path, opener)
    if vol is None: return 0
    accounted(raw, vol)
    assert vol.data.shape and np.isfinite(vol.data).all() and np.isfinite(vol.affine).all() and np.linalg.det(vol.affine[:3,:3])!=0
    with np.errstate(all='ignore'): img = nib.load(path); x = img.get_fdata().reshape(img.shape[:3])
    back = nib.orientations.apply_orientation(vol.data, vol.source.back)
    if opener is open_ct:
        if any('became air' in o for o in vol.notes): x = np.where(np.isfinite(x) & (abs(x)<3e38), x, back)
        x = np.clip(x, -1024, 32767)
    assert np.allclose(back, x, rtol=1e-5, atol=1e-3)
    # a mask fits whatever was opened
    save_mask((vol.data>0).astype(np.uint8), vol, path.with_name('out.nii'))
    out = nib.load(path.with_name('out.nii'))
    assert out.shape==img.shape and np.array_equal(np.asarray(out.dataobj).reshape(x.shape), back>0)
    assert np.allclose(out.affine, img.affine)
    return 1

@pytest.mark.parametrize('version,order', formats)
@pytest.mark.parametrize('opener', [open_ct, open_mask])
@pytest.mark.filterwarnings('error::RuntimeWarning')
def test_unpacked(tmp_path, version, order, opener):
    path,rng = tmp_path/'scan.nii',np.random.default_rng(version+ord(order))
    data = hu() if opener is open_ct else (hu()>0).astype(np.uint8)
    whole = nifti(data, version=version, order=order)
    opens = 0
    for i in range(count//20):
        raw = damage(whole, rng, sizes[version] if i%4 else None)  # mostly in the header
        opens += check_nii(path, raw, opener)
    assert 0<opens<count//20  # neither everything refused nor everything taken

@pytest.mark.parametrize('version', [1, 2])
def test_every_byte_of_a_header(tmp_path, version):
    path,rng = tmp_path/'scan.nii',np.random.default_rng(version)
    whole = nifti(hu((5,4,4)), version=version)
    for at in range(sizes[version]+4):
        raw = bytearray(whole); raw[at] ^= 255 if rng.random()<.3 else 1<<int(rng.integers(8))
        check_nii(path, bytes(raw), open_ct)

# ---- files as scanners and tools write them, large enough to be judged as HU

kinds = [(np.int16,(1,0)), (np.int16,(1,-1024)), (np.uint16,(1,-1024)), (np.float32,(1,0)), (np.int16,(.5,-24))]

def like_real(rng)->tuple:
    "Bytes of a chest with free text, an extension, units of time, a trailing axis of 1, or one affine only; its version and byte order"
    (dtype,(slope,inter)),(version,order) = kinds[rng.integers(len(kinds))],formats[rng.integers(4)]
    stored = np.rint((chest((36,34,32), seed=int(rng.integers(9)))-inter)/slope).clip(0 if dtype==np.uint16 else -2**15, None).astype(dtype)
    raw = nifti(stored, version=version, order=order, scaling=(slope,inter), qform=rng.random()<.5)
    changes = dict(descrip=b'GE MEDICAL SYSTEMS', aux_file=b'none', xyzt_units=10)
    if rng.random()<.3: changes['dim'] = (4,*stored.shape,1,1,1,1)
    if rng.random()<.3: changes['sform_code'] = int(peek(raw, version, order, 'qform_code')[0]>0 and 0 or 1)
    raw = patch(raw, version, order, **changes)
    if rng.random()<.3:
        first,o = (352,544)[version-1],'little' if order=='<' else 'big'
        raw = raw[:first-4]+b'\1\0\0\0'+(32).to_bytes(4, o)+(6).to_bytes(4, o)+b'text'.ljust(24, b'\0')+raw[first:]
        raw = patch(raw, version, order, vox_offset=first+32)
    return raw,version,order

def hostile(raw, version, order, rng)->bytes:
    "Numbers in the header that are valid, large or strange"
    n = [int(o) for o in rng.choice([1,2,4,5,34,512,4096,32767], 7)]
    odd = [0., -1., 1e-300 if version==2 else 1e-40, 1e30, float('nan'), float('inf'), 10., 1e-3]
    pick = lambda: odd[rng.integers(len(odd))]
    changes = [dict(dim=(int(rng.integers(0, 9)),*n)), dict(dim={int(rng.integers(8)):n[0]}), dict(pixdim={int(rng.integers(8)):pick()}), dict(scl_slope=pick()), dict(scl_inter=pick()),
        dict(vox_offset=[0,352,544,1000,2**20,2**30][rng.integers(6)]), dict(srow={int(rng.integers(12)):pick()}), dict(quatern={int(rng.integers(3)):pick()}),
        dict(datatype=int(rng.choice([2,4,8,16,64,256,512,768,1024,1280,1536,128]))), dict(xyzt_units=int(rng.integers(0, 64))), dict(sform_code=int(rng.integers(-1, 7)))]
    for i in rng.choice(len(changes), rng.integers(1, 3), replace=False): raw = patch(raw, version, order, **changes[i])
    return raw

@pytest.mark.filterwarnings('error::RuntimeWarning')
@pytest.mark.fault('H5','H7','H14','H15','H17','D4','D6')
@pytest.mark.promise('silent')
@pytest.mark.parametrize('packed', [False, True])
def test_like_real(tmp_path, packed):
    "Damaged files end in one line that says what is wrong, or open as they are: no hang, no gigabytes, no changed geometry without a note"
    rng,path = np.random.default_rng(packed),tmp_path/('scan.nii.gz' if packed else 'scan.nii')
    for i in range(max(count//10, 4)):
        if i%20==0: whole,version,order = like_real(rng); path.write_bytes(gzip.compress(whole, 1) if packed else whole); want = open_ct(path)
        raw = hostile(whole, version, order, rng) if i%2 else damage(whole, rng, sizes[version]) if i%4 else whole
        if not packed: check_nii(path, raw if raw is not whole else damage(whole, rng), open_ct)
        elif raw is whole: check_gz(path, damage(gzip.compress(whole, 1), rng), want)
        else:
            path.write_bytes(gzip.compress(raw, 1))
            if vol:=opened(path): accounted(raw, vol)
