"Valid NIfTI files as bytes, and the documented offsets to break them at"
import gzip, re, struct
import nibabel as nib, numpy as np, pytest
from covid3d.volume import CTError, open_ct

# name: (offset, struct code), from nifti1.h and nifti2.h
fields = {
    1: dict(sizeof_hdr=(0,'i'), data_type=(4,'10s'), db_name=(14,'18s'), dim=(40,'8h'), datatype=(70,'h'), bitpix=(72,'h'), pixdim=(76,'8f'),
        vox_offset=(108,'f'), scl_slope=(112,'f'), scl_inter=(116,'f'), xyzt_units=(123,'b'), descrip=(148,'80s'), aux_file=(228,'24s'), qform_code=(252,'h'),
        sform_code=(254,'h'), quatern=(256,'3f'), qoffset=(268,'3f'), srow=(280,'12f'), intent_name=(328,'16s'), magic=(344,'4s')),
    2: dict(sizeof_hdr=(0,'i'), magic=(4,'4s'), eol_check=(8,'4s'), datatype=(12,'h'), bitpix=(14,'h'), dim=(16,'8q'), pixdim=(104,'8d'), vox_offset=(168,'q'),
        scl_slope=(176,'d'), scl_inter=(184,'d'), descrip=(240,'80s'), aux_file=(320,'24s'), qform_code=(344,'i'), sform_code=(348,'i'), quatern=(352,'3d'),
        qoffset=(376,'3d'), srow=(400,'12d'), xyzt_units=(500,'i'), intent_name=(508,'16s'), unused_str=(525,'15s'))}
sizes = {1:348, 2:540}
upright = nib.affines.from_matvec(np.diag([-.7,.8,2.5]), [90,-110,-240])  # file axes L-A-S
formats = [(v,o) for v in (1,2) for o in '<>']

def hu(shape=(9,8,7), seed=0):
    "Whole HU between air and bone"
    return np.random.default_rng(seed).integers(-1000, 500, shape).astype(np.int16)

def chest(shape=(64,48,40), noise=20, seed=0):
    "int16 HU that pass for a chest, file axes L-A-S: a body with two lungs and a spine"
    x,y,z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing='ij')
    hu = np.full(shape, -1000.)
    for value,cy,cx,ry,rx in [(-100,0,0,.85,.9), (45,0,0,.75,.82), (-850,.05,.42,.55,.32), (-850,0,-.42,.5,.3), (500,-.55,0,.16,.12)]:
        hu[((y-cy)/ry)**2+((x-cx)/rx)**2<1] = value
    return np.rint(hu+np.random.default_rng(seed).normal(0, noise, shape)).astype(np.int16)

def nifti(data, affine=upright, version=1, order='<', scaling=(1,0), qform=True)->bytes:
    "A valid file; `scaling` is (slope, intercept) as stored, the voxels are not touched"
    img_cls,hdr_cls = [(nib.Nifti1Image,nib.Nifti1Header), (nib.Nifti2Image,nib.Nifti2Header)][version-1]
    img = img_cls(data, affine, hdr_cls(endianness=order), dtype=data.dtype)
    img.set_sform(affine, 1); img.set_qform(affine, int(qform)); img.header.set_xyzt_units('mm')
    img.header.set_slope_inter(1, 0)
    return patch(img.to_bytes(), version, order, scl_slope=scaling[0], scl_inter=scaling[1])

def peek(raw, version, order, name): return struct.unpack_from(order+fields[version][name][1], raw, fields[version][name][0])

def patch(raw, version=1, order='<', at=None, **changes)->bytes:
    "Set header fields; `pixdim={1:0}` sets one entry"
    raw = bytearray(raw)
    for name,value in changes.items():
        offset,code = fields[version][name]
        if isinstance(value, dict):
            new = list(peek(raw, version, order, name))
            for i,o in value.items(): new[i] = o
            value = new
        struct.pack_into(order+code, raw, offset, *(value if isinstance(value, (list,tuple)) else (value,)))
    return bytes(raw)

class Base:
    "A valid scan in one version and byte order, with `patch` bound to it"
    def __init__(self, folder, version=1, order='<', data=None, **kwargs):
        self.folder,self.version,self.order = folder,version,order
        self.data = hu() if data is None else data
        self.raw = nifti(self.data, version=version, order=order, **kwargs)
    @property
    def canonical(self): return self.data.transpose(2,1,0)[:,::-1]  # L-A-S to S-P-L
    def write(self, raw=None, name='scan.nii', **changes):
        raw = patch(self.raw if raw is None else raw, self.version, self.order, **changes)
        path = self.folder/name
        path.write_bytes(gzip.compress(raw) if name.endswith('.gz') else raw)
        return path

def refused(path, pattern, opener=open_ct, names=None, **kwargs)->str:
    "Opening is refused in one line that names the file, the fault and a remedy"
    with pytest.raises(CTError, match=pattern) as e: opener(path, **kwargs)
    message = str(e.value)
    assert message.startswith(str(names or path)) and message.endswith(f'. {e.value.remedy}.') and len(e.value.remedy)>5 and '\n' not in message
    return message

def noted(path, pattern, opener=open_ct, **kwargs):
    "Opens, and `notes` says what was odd"
    vol = opener(path, **kwargs)
    assert any(re.search(pattern, o) for o in vol.notes), vol.notes
    return vol

def quiet(path, opener=open_ct, **kwargs):
    "Opens without a note"
    vol = opener(path, **kwargs)
    assert vol.notes==()
    return vol
