"A scan opened, a mask written: voxel for voxel, in every orientation, byte order and version; and what is written tells nothing it should not"
import gzip, os
from itertools import permutations, product
import nibabel as nib, numpy as np, pytest
from hypothesis import given, settings, strategies as st
from covid3d.volume import CTError, Volume, canonical_affine, canonical_axes, open_ct, open_mask, save_mask, save_volume, write_atomic
from nifti_bytes import Base, formats, hu, nifti, patch, quiet, refused

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures('no_fsync')
all_axes = [''.join(p) for order in permutations(('LR','PA','IS')) for p in product(*order)]
shape,spacings = (5,7,6),((.7,.8,2.5), (5,.6,.6), (1,1,1), (.65,3.1,1.2))

def rotation(rng, degrees):
    "A turn by an angle up to `degrees` about an axis of any direction (Rodrigues)"
    x,y,z = (lambda o: o/np.linalg.norm(o))(rng.normal(size=3))
    k,t = np.array([[0,-z,y],[z,0,-x],[-y,x,0]]),np.deg2rad(rng.uniform(-degrees, degrees))
    return np.eye(3)+np.sin(t)*k+(1-np.cos(t))*k@k

def file_affine(axes, spacing, turn, origin):
    "The affine of an array with the axes `axes`, then turned in the patient"
    out = np.zeros((3,3))
    for i,o in enumerate(axes): out['LRPAIS'.index(o)//2,i] = spacing[i]*(1 if o in 'RAS' else -1)
    return nib.affines.from_matvec(turn@out, origin)

def indices(shape): return np.array([*np.ndindex(*shape)]).T

def world(affine, i): return affine[:3,:3]@i+affine[:3,3:]

def check_round_trip(folder, axes, spacing, degrees, version, order, gz, scaling, rng):
    "open_ct → canonical → save_mask → open_mask, with nibabel as the oracle"
    affine = file_affine(axes, spacing, rotation(rng, degrees), rng.uniform(-300, 300, 3))
    stored = rng.permutation(np.prod(shape)).reshape(shape).astype(np.int16)*3  # every value once: each voxel is a marker
    low = stored if scaling!=(1,0) else stored-1000
    path,out = (folder/f'{o}{"_packed" if gz else ""}.nii{gz}' for o in ('scan','mask'))
    raw = nifti(low, affine, version, order, scaling)
    path.write_bytes(gzip.compress(raw) if gz else raw)
    ct,src = quiet(path),nib.load(path)
    values = src.get_fdata()

    # each voxel is where nibabel has it, and its value is the one that nibabel reads there
    i = indices(ct.shape)
    at = np.linalg.solve(src.affine, np.vstack([world(ct.affine, i), np.ones(i.shape[1])]))[:3]
    j = np.rint(at).astype(int)
    assert abs(at-j).max()<1e-3 and np.array_equal(np.unique(j, axis=1), indices(shape))
    assert np.array_equal(ct.data[tuple(i)], values[tuple(j)])
    # the axes are the nearest to S, P, L, by nibabel and, for small turns, by their angles
    assert nib.aff2axcodes(ct.affine)==canonical_axes and np.allclose(sorted(ct.spacing), sorted(spacing), atol=1e-5)
    if degrees<=30: assert ((ct.affine[:3,:3]/ct.spacing)[[2,1,0],[0,1,2]]*[1,-1,-1]).min()>.85

    # the mask lies on the file's grid and marks the same voxels
    mask = (ct.data>np.median(ct.data)).astype(np.uint8); mask[1,2,3] ^= 1
    save_mask(mask, ct, out)
    img = nib.load(out)
    assert img.shape==src.shape and np.array_equal(img.affine, src.affine) and type(img.header)==type(src.header)
    assert img.header.endianness==src.header.endianness and img.get_data_dtype()==np.uint8
    for code in ('sform_code','qform_code','xyzt_units'): assert img.header[code]==src.header[code]
    assert np.array_equal(np.asarray(img.dataobj)[tuple(j)], mask[tuple(i)])
    assert np.array_equal(quiet(out, open_mask, like=ct).data, mask)

@each('axes', all_axes)
def test_round_trip(tmp_path, axes):
    "Every orientation, in both versions, byte orders, packed or not, scaled or not, upright, tilted and turned"
    rng = np.random.default_rng(all_axes.index(axes))
    for n,((version,order),gz,scaling,degrees) in enumerate(product(formats, ('','.gz'), ((1,0),(1,-1024),(2.5,-999.25)), (0,30,180))):
        if (n+n//3+all_axes.index(axes))%3==0:  # a third of the combinations for each orientation, every tilt among them: all of them, 16 times over
            check_round_trip(tmp_path, axes, spacings[rng.integers(4)], degrees, version, order, gz, scaling, rng)

def test_there_are_48_orientations(): assert len(set(all_axes))==48

@settings(max_examples=100, deadline=None)
@given(axes=st.sampled_from(all_axes), spacing=st.tuples(*[st.floats(.1, 9.9)]*3), degrees=st.sampled_from([0,.01,5,44,180]),
    seed=st.integers(0, 2**16), fmt=st.sampled_from(formats), gz=st.sampled_from(['','.gz']), scaling=st.sampled_from([(1,0),(1,-1024),(.5,-300)]))
def test_round_trip_of_any_spacing(tmp_path_factory, axes, spacing, degrees, seed, fmt, gz, scaling):
    check_round_trip(tmp_path_factory.mktemp('trip'), axes, spacing, degrees, *fmt, gz, scaling, np.random.default_rng(seed))

@each('scaling,dtype', [((1,0),np.int16), ((1,-1024),np.int16), ((2,-100),np.int16), ((.5,-600),np.float32)])
def test_whole_numbers_stay_whole(tmp_path, scaling, dtype):
    base = Base(tmp_path, scaling=scaling)
    vol = open_ct(base.write())
    assert vol.data.dtype==dtype and vol.data.flags.c_contiguous
    assert np.array_equal(vol.data, np.clip(base.canonical*scaling[0]+scaling[1], -1024, 32767))

# ---- save_volume

@settings(max_examples=50, deadline=None)
@given(size=st.tuples(*[st.integers(4, 9)]*3), spacing=st.tuples(*[st.floats(.1, 9)]*3), origin=st.tuples(*[st.floats(-500, 500)]*3),
    turn=st.sampled_from([0,20,180]), gz=st.sampled_from(['','.gz']), dtype=st.sampled_from([np.int16,np.int32,np.float32,np.float64]), seed=st.integers(0, 99))
def test_save_volume(tmp_path_factory, size, spacing, origin, turn, gz, dtype, seed):
    rng,path = np.random.default_rng(seed),tmp_path_factory.mktemp('vol')/f'scan.nii{gz}'
    affine = nib.affines.from_matvec(rotation(rng, turn))@canonical_affine(spacing, origin)
    vol = Volume(hu(size, seed).astype(dtype), affine)
    save_volume(vol, path)
    back,img = quiet(path),nib.load(path)
    if turn<=20:
        assert np.array_equal(back.data, vol.data) and np.allclose(back.affine, affine, atol=1e-3) and nib.aff2axcodes(img.affine)==('L','P','S')
    assert np.array_equal(img.get_fdata(), vol.data.transpose(2,1,0)) and np.allclose(img.affine, affine[:,[2,1,0,3]], atol=1e-3)
    assert img.get_data_dtype()==dtype and img.header['xyzt_units']&7==2 and img.header['sform_code']==img.header['qform_code']==1

@each('shear', [.001, .05, .3])
def test_save_sheared(tmp_path, shear):
    "A qform holds no shear: it is left out, or the file would contradict itself"
    affine = canonical_affine((2.5,.8,.7)); affine[0,0] = shear
    vol = Volume(hu((200,9,8)), affine)
    save_volume(vol, tmp_path/'scan.nii')
    back = open_ct(tmp_path/'scan.nii')
    assert np.allclose(back.affine, affine, atol=1e-5) and np.array_equal(back.data, vol.data)
    assert nib.load(tmp_path/'scan.nii').header['qform_code']==0

def test_save_bool_volume(plain):
    ct = open_ct(plain.write())
    save_volume(ct.new(ct.data>0), plain.folder/'mask.nii')
    assert np.array_equal(open_mask(plain.folder/'mask.nii', like=ct).data, ct.data>0)

@each('dtype', [np.int64, np.uint64, np.float16, np.complex64])
def test_save_other_types(plain, dtype):
    ct = open_ct(plain.write())
    refused(plain.folder/'out.nii', 'voxels of type', lambda p: save_volume(ct.new(ct.data.astype(dtype)), p))

# ---- writing is whole or not at all

def fail(*args, **kwargs): raise OSError(28, 'No space left on device')

def stop(*args, **kwargs): raise KeyboardInterrupt

def only(folder, name, content): return [o.name for o in folder.iterdir()]==[name] and (folder/name).read_bytes()==content

@each('broken', ['replace','fsync','open'])
@each('how', [fail, stop])
def test_write_fails_half_way(tmp_path, monkeypatch, broken, how):
    (tmp_path/'mask.nii').write_bytes(b'old')
    monkeypatch.setattr(os, broken, how)
    with pytest.raises(CTError if how is fail else KeyboardInterrupt) as e: write_atomic(tmp_path/'mask.nii', b'new')
    if how is fail: assert str(e.value)==f'{tmp_path/"mask.nii"}: cannot be written (No space left on device). {e.value.remedy}.'
    monkeypatch.undo()
    assert only(tmp_path, 'mask.nii', b'old')

def test_write_to_read_only_folder(tmp_path, monkeypatch):
    "Simulated, as the tests may run as root, who may write everywhere"
    (tmp_path/'mask.nii').write_bytes(b'old')
    def denied(*args, **kwargs): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(os, 'open', denied)
    refused(tmp_path/'mask.nii', 'Permission denied', lambda p: write_atomic(p, b'new'))
    assert only(tmp_path, 'mask.nii', b'old')

def test_write_where_a_file_is_the_folder(tmp_path):
    (tmp_path/'a').write_bytes(b'old')
    refused(tmp_path/'a'/'mask.nii', 'cannot be written', lambda p: write_atomic(p, b'new'))
    (tmp_path/'mask.nii').mkdir()
    refused(tmp_path/'mask.nii', 'cannot be written', lambda p: write_atomic(p, b'new'))
    assert sorted(o.name for o in tmp_path.iterdir())==['a','mask.nii']

def test_write_replaces(tmp_path):
    path = tmp_path/'new'/'folder'/'mask.nii'
    for content in (b'old',b'new'): write_atomic(path, content); assert only(path.parent, 'mask.nii', content)
    mask = os.umask(0); os.umask(mask)
    assert path.stat().st_mode&0o777==0o666&~mask

def test_failed_save_keeps_the_old_mask(plain, monkeypatch):
    ct,path = open_ct(plain.write()),plain.folder/'mask.nii.gz'
    save_mask((ct.data>0).astype(np.uint8), ct, path); old = path.read_bytes()
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(CTError, match='No space left'): save_mask((ct.data>99).astype(np.uint8), ct, path)
    assert path.read_bytes()==old and len(list(plain.folder.iterdir()))==2

# ---- what is written tells nothing about the patient or the day

secret = b'DOE^JANE'

def with_text(base)->bytes:
    "The base with the secret in every field of free text and in an extension"
    names = ['descrip','aux_file','intent_name']+(['data_type','db_name'] if base.version==1 else ['unused_str'])
    raw = patch(base.raw, base.version, base.order, **{k:secret for k in names})
    first = 352 if base.version==1 else 544
    size = (32).to_bytes(4, 'little' if base.order=='<' else 'big')
    code = (6).to_bytes(4, 'little' if base.order=='<' else 'big')
    raw = raw[:first-4]+b'\1\0\0\0'+size+code+secret.ljust(24, b'\0')+raw[first:]
    return patch(raw, base.version, base.order, vox_offset=first+32)

@each('name', ['mask.nii','mask.nii.gz'])
def test_free_text_is_not_copied(base, name):
    path = base.write(with_text(base), 'scan.nii')
    assert path.read_bytes().count(secret)==6-(base.version==2) and len(nib.load(path).header.extensions)==1
    ct = quiet(path)
    assert np.array_equal(ct.data, base.canonical)
    save_mask((ct.data>0).astype(np.uint8), ct, base.folder/name)
    raw = (base.folder/name).read_bytes()
    assert secret not in (gzip.decompress(raw) if name.endswith('gz') else raw)
    assert len(nib.load(base.folder/name).header.extensions)==0
    save_volume(ct, base.folder/'again.nii'); assert secret not in (base.folder/'again.nii').read_bytes()

def test_gzip_header(plain):
    "RFC 1952: no flags, so no FNAME, FCOMMENT or FEXTRA; mtime 0; the same mask gives the same bytes"
    ct = open_ct(plain.write())
    for name in ('a.nii.gz','b.nii.gz'): save_mask((ct.data>0).astype(np.uint8), ct, plain.folder/name)
    a,b = ((plain.folder/name).read_bytes() for name in ('a.nii.gz','b.nii.gz'))
    assert a[:3]==b'\x1f\x8b\x08' and a[3]==0 and a[4:8]==bytes(4) and a==b
