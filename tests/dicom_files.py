"Valid DICOM series made by the tests, classic and enhanced, in any encoding; and what SimpleITK reads from the same files"
import copy, re, tempfile
from pathlib import Path

import numpy as np, pydicom, pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1, RLELossless

from covid3d.dicom import ct_datasets, open_series, save_dicom
from covid3d.volume import CTError, Volume, canonical_affine

jane = 'DOE^JANE'  # planted wherever a name may stand, and never to be seen again
native = dict(implicit=ImplicitVRLittleEndian, little=ExplicitVRLittleEndian, big=ExplicitVRBigEndian)
packed = dict(rle=RLELossless, j2k=JPEG2000Lossless, jpegls=JPEGLSLossless, jpeg=JPEGLosslessSV1)

def scan(shape=(6,9,7), seed=0, spacing=(2.5,.8,.7))->Volume:
    "Whole HU, air to bone, without any symmetry"
    z,y,x = np.indices(shape)
    noise = np.random.default_rng(seed).integers(-20, 20, shape)
    return Volume((-1000+70*z+25*y+90*x+noise).clip(-1024, 3000).astype(np.int16), canonical_affine(spacing, (90,110,-240)))

def sets_of(vol=None, **kwargs)->list:
    "The datasets of `scan`, of a patient with a name"
    sets = ct_datasets(scan() if vol is None else vol, patient=jane, **kwargs)
    for ds in sets:
        ds.PatientName = ds.ReferringPhysicianName = jane; ds.PatientBirthDate,ds.PatientSex,ds.StudyDate,ds.StudyTime = '19700101','F','20200401','101500'
        ds.OtherPatientIDs = [jane,'12345-'+jane]; ds.StudyID,ds.AccessionNumber = 'DOE','JANE'
        ds.add_new(0x00091010, 'LO', jane)
    return sets

def meta(ds, syntax):
    "A copy of `ds` that will be written in `syntax`"
    ds = copy.deepcopy(ds); ds.file_meta = FileMetaDataset(); ds.file_meta.TransferSyntaxUID = syntax
    return ds

def encode(ds, syntax)->Dataset:
    "`ds`, whose pixels are plain little endian, in another transfer syntax"
    ds = meta(ds, syntax if syntax in native.values() else ExplicitVRLittleEndian)
    if syntax==ExplicitVRBigEndian: ds.PixelData = np.frombuffer(ds.PixelData, '<u2').astype('>u2').tobytes()
    if syntax in (RLELossless,JPEGLSLossless): ds.compress(syntax, generate_instance_uid=False)
    elif syntax not in native.values(): by_gdcm(ds, syntax)
    return ds

def by_gdcm(ds, syntax):
    "Compress in place with GDCM, which has the encoders that pydicom lacks"
    import gdcm
    with tempfile.TemporaryDirectory() as d:
        plain = copy.deepcopy(ds); plain.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian; save_dicom(plain, Path(d)/'in.dcm')
        reader,change,writer = gdcm.ImageReader(),gdcm.ImageChangeTransferSyntax(),gdcm.ImageWriter()
        reader.SetFileName(f'{d}/in.dcm'); assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax))); change.SetInput(reader.GetImage()); assert change.Change()
        writer.SetFileName(f'{d}/out.dcm'); writer.SetFile(reader.GetFile()); writer.SetImage(change.GetOutput()); assert writer.Write()
        ds.PixelData = pydicom.dcmread(f'{d}/out.dcm').PixelData
    ds['PixelData'].VR = 'OB'; ds['PixelData'].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax

def save_all(sets, folder, name='IM{:03d}.dcm')->Path:
    "The datasets as files of one folder"
    for i,ds in enumerate(sets): save_dicom(ds, Path(folder)/name.format(i))
    return Path(folder)

def shared_groups(ds)->Dataset:
    "Functional groups that are the same for all frames"
    g,measures,plane,rescale = Dataset(),Dataset(),Dataset(),Dataset()
    measures.PixelSpacing,measures.SliceThickness,plane.ImageOrientationPatient = ds.PixelSpacing,ds.SliceThickness,ds.ImageOrientationPatient
    rescale.RescaleIntercept,rescale.RescaleSlope,rescale.RescaleType = ds.RescaleIntercept,ds.RescaleSlope,'HU'
    g.PixelMeasuresSequence,g.PlaneOrientationSequence,g.PixelValueTransformationSequence = [measures],[plane],[rescale]
    return g

def frame_groups(ds, i, rescale)->Dataset:
    "Functional groups of a frame"
    g,content,position = Dataset(),Dataset(),Dataset()
    content.StackID,content.InStackPositionNumber,content.DimensionIndexValues = '1',i+1,[1,i+1]
    position.ImagePositionPatient = ds.ImagePositionPatient
    g.FrameContentSequence,g.PlanePositionSequence = [content],[position]
    if rescale: g.PixelValueTransformationSequence = shared_groups(ds).PixelValueTransformationSequence
    return g

def enhanced(sets, per_frame=False)->Dataset:
    "Classic slices as one enhanced CT; the rescale is shared, or given for each frame"
    ds = copy.deepcopy(sets[0])
    for k in 'ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness RescaleIntercept RescaleSlope RescaleType'.split(): delattr(ds, k)
    ds.SOPClassUID,ds.NumberOfFrames = '1.2.840.10008.5.1.4.1.1.2.1',len(sets)
    g = shared_groups(sets[0])
    if per_frame: del g.PixelValueTransformationSequence
    ds.SharedFunctionalGroupsSequence,ds.PerFrameFunctionalGroupsSequence = [g],[frame_groups(o, i, per_frame) for i,o in enumerate(sets)]
    ds.PixelData = b''.join(o.PixelData for o in sets); ds['PixelData'].VR = 'OW'
    ds.ContentDate,ds.ContentTime,ds.AcquisitionDateTime = '20200401','101500','20200401101500'
    ds.ImageType = ['ORIGINAL','PRIMARY','VOLUME','NONE']
    return ds

def to_ras(img)->np.ndarray:
    "4×4, index (slice, row, column) → RAS mm, of a SimpleITK image"
    affine = np.eye(4)
    affine[:3,:3] = np.reshape(img.GetDirection(), (3,3))*img.GetSpacing(); affine[:3,3] = img.GetOrigin()
    return (np.diag([-1,-1,1,1])@affine)[:,[2,1,0,3]]

def by_simpleitk(folder, uid='')->tuple:
    "A series as SimpleITK reads it: voxels (slice, row, column) clipped at air, and its affine"
    import SimpleITK as sitk
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
    img = sitk.ReadImage(names if len(names)>1 else names[0], sitk.sitkFloat64)
    return np.clip(sitk.GetArrayFromImage(img), -1024, 32767),to_ras(img)

def slice_by_slice(vol)->tuple:
    "The slices of a volume in its order, each file read on its own by SimpleITK: voxels (slice, row, column) clipped at air, and positions in L-P-S mm"
    import SimpleITK as sitk
    read,xs,at = {},[],[]
    for s in vol.source.slices:
        if s.path not in read: read[s.path] = sitk.ReadImage(str(s.path), sitk.sitkFloat64)
        img = read[s.path]
        xs.append(sitk.GetArrayFromImage(img)[s.frame]); at.append(img.TransformIndexToPhysicalPoint((0,0,s.frame)))
    return np.clip(xs, -1024, 32767),np.array(at)

def in_file_order(vol)->np.ndarray:
    "The voxels as (slice, row, column) of the files"
    from covid3d.volume import from_canonical
    return from_canonical(vol.data, vol.source.back).transpose(2,1,0)

def same_image(vol, voxels, affine, eps=1e-4):
    "The volume holds the same voxels at the same places, whatever the order of its axes"
    x,back = in_file_order(vol),vol.source.header.get_best_affine()[:,[2,1,0,3]]
    if np.sign(back[:3,0]@affine[:3,0])<0: voxels,affine = voxels[::-1],affine@np.array([[-1,0,0,len(voxels)-1], [0,1,0,0], [0,0,1,0], [0,0,0,1]])
    assert np.array_equal(x, voxels) and np.allclose(back, affine, atol=eps)

def refused(path, pattern, names=None, opener=open_series)->str:
    "Opening is refused in one line that names a path, the fault and a remedy, and nobody"
    with pytest.raises(CTError, match=pattern) as e: opener(path)
    message = str(e.value)
    assert message.startswith(f'{names or path}: ') and message.endswith(f'. {e.value.remedy}.') and len(e.value.remedy)>5 and '\n' not in message
    assert not re.search('DOE|JANE', message)
    return message

def noted(path, pattern, opener=open_series)->Volume:
    "Opens, and `notes` says what was odd, and names nobody"
    vol = opener(path)
    assert any(re.search(pattern, o) for o in vol.notes) and not re.search('DOE|JANE', str(vol.notes)), vol.notes
    return vol

def quiet(path)->Volume:
    "Opens without a note"
    vol = open_series(path)
    assert vol.notes==()
    return vol
