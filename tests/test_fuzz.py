"""Random damage to a valid file: refused by CTError, or read as nibabel reads it; never another exception. COVID3D_FUZZ=2000 tries more.

In a packed file the checksum covers every voxel, so damage is refused unless it hits bytes of the gzip header that carry no data."""
import gzip, os, zlib
import nibabel as nib, numpy as np, pytest
from covid3d.volume import CTError, open_ct, open_mask, save_mask
from nifti_bytes import formats, hu, nifti, sizes

count = int(os.environ.get('COVID3D_FUZZ', 200))

pytestmark = pytest.mark.usefixtures('no_fsync')

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
    try: return opener(path)
    except CTError as e:
        assert str(e).startswith(f'{path}: ') and '\n' not in str(e)

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
    for _ in range(count//2):
        raw = damage(whole, rng)
        ok = check_gz(path, raw, want)
        survivors += ok
    assert survivors<count//8

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

def check_nii(path, raw, opener):
    path.write_bytes(raw)
    vol = opened(path, opener)
    if vol is None: return 0
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
    for i in range(count//4):
        raw = damage(whole, rng, sizes[version] if i%4 else None)  # mostly in the header
        opens += check_nii(path, raw, opener)
    assert 0<opens<count//4  # neither everything refused nor everything taken

@pytest.mark.parametrize('version', [1, 2])
def test_every_byte_of_a_header(tmp_path, version):
    path,rng = tmp_path/'scan.nii',np.random.default_rng(version)
    whole = nifti(hu((5,4,4)), version=version)
    for at in range(sizes[version]+4):
        raw = bytearray(whole); raw[at] ^= 255 if rng.random()<.3 else 1<<int(rng.integers(8))
        check_nii(path, bytes(raw), open_ct)
