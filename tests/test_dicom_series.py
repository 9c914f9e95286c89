"DICOM series and segmentations without faults: SimpleITK, pydicom and highdicom see the same voxels at the same places"
import io, itertools, logging, os, warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import highdicom as hd, nibabel as nib, numpy as np, pydicom, pytest
from pydicom.sr.codedict import codes

from covid3d.dicom import find_series, open_scan, open_series, survey, write_series
from covid3d.dicom_seg import save_seg, seg_codes
from covid3d.dicom_sr import save_sr
from covid3d.inference import Segmentation
from covid3d.quantify import quantify
from covid3d.volume import CTError, Volume, open_mask, save_mask
from dicom_files import (by_simpleitk, encode, enhanced, in_file_order, meta, native, packed, quiet, same_image, save_all, scan, sets_of, slice_by_slice)

each = pytest.mark.parametrize
pytestmark = pytest.mark.usefixtures('no_fsync')
data = os.environ.get('COVID3D_TEST_DATA')

def agrees(folder):
    "SimpleITK reads the same series from the folder, as a whole and slice by slice"
    vol = quiet(folder)
    same_image(vol, *by_simpleitk(folder))
    voxels,at = slice_by_slice(vol)
    assert np.array_equal(in_file_order(vol), voxels) and np.allclose(at, [s.position for s in vol.source.slices], atol=1e-4)
    return vol

def acquired(rotation, shape=(6,9,7), spacing=(2.5,.8,.7))->list:
    "Datasets of a scan whose (row, column, normal) directions are the columns of `rotation`, L-P-S"
    sets = sets_of(scan(shape, spacing=spacing))
    for i,ds in enumerate(sets):
        ds.ImageOrientationPatient = [f'{o:.10g}' for o in rotation[:,:2].T.ravel()]
        ds.ImagePositionPatient = [f'{o:.10g}' for o in np.array([-31.5,12.25,-240])+rotation[:,2]*i*spacing[0]]
    return sets

def rotations()->dict:
    "The 48 ways to lie along the axes, mirrored ones (slices stored against the normal) included, and 8 oblique ones"
    res = {}
    for p in itertools.permutations(range(3)):
        for s in itertools.product((1,-1), repeat=3): res['LPS'[p[0]]+'LPS'[p[1]]+''.join('-+'[o>0] for o in s)] = np.eye(3)[:,p]*s
    rng = np.random.default_rng(0)
    for i in range(8): res[f'oblique{i}'] = np.linalg.qr(rng.normal(size=(3,3)))[0]
    return res

@each('name', rotations())
def test_orientation(tmp_path, name):
    "All orientations: same image as SimpleITK's, on canonical axes, with the way back to the files"
    vol = agrees(save_all(acquired(rotations()[name]), tmp_path))
    if not name.startswith('o'): assert nib.aff2axcodes(vol.affine)==('S','P','L')
    save_mask((vol.data>0).astype(np.uint8), vol, tmp_path/'mask.nii.gz')
    assert np.array_equal(open_mask(tmp_path/'mask.nii.gz', like=vol).data, vol.data>0)
    assert np.array_equal(np.asarray(nib.load(tmp_path/'mask.nii.gz').dataobj).T, in_file_order(vol)>0)

def stored(sets, bits=16, signed=0, slope=1, inter=-1024, garbage=False):
    "The same HU (to the step of `slope`) with other stored numbers; `garbage` fills the bits above BitsStored"
    for ds in sets:
        hu = np.frombuffer(ds.PixelData, '<u2').astype(float)-1024
        low,high = (-2**(bits-1),2**(bits-1)-1) if signed else (0,2**bits-1)
        x = np.rint((hu-inter)/slope).clip(low, high).astype(np.int64)&(2**bits-1)
        if garbage: x |= 0b101<<bits & 0xFFFF
        elif signed and bits<16: x = np.where(x>>(bits-1), x|(0xFFFF<<bits & 0xFFFF), x)
        ds.PixelData = x.astype('<u2').tobytes()
        ds.BitsStored,ds.HighBit,ds.PixelRepresentation,ds.RescaleSlope,ds.RescaleIntercept = bits,bits-1,signed,str(slope),str(inter)
    return sets

numbers = dict(unsigned=dict(), signed=dict(signed=1, inter=0), signed_shifted=dict(signed=1), bits12=dict(bits=12), bits12_signed=dict(bits=12, signed=1, inter=0), bits13=dict(bits=13, signed=1, inter=-1024),
    half=dict(slope=.5), double=dict(slope=2), odd=dict(slope=1.25, inter=-1000.5), far=dict(signed=1, inter=30000), small=dict(slope=.0625, inter=-1024))

@each('name', numbers)
@each('order', native)
def test_stored_numbers(tmp_path, name, order):
    vol = agrees(save_all([encode(o, native[order]) for o in stored(sets_of(), **numbers[name])], tmp_path))
    step = float(numbers[name].get('slope', 1))
    assert abs(vol.data-scan().data).max()<=abs(step)/2+1e-3 or name in ('far','small','bits12_signed','half')
    assert (vol.data.dtype==np.int16)==(step.is_integer() and float(numbers[name].get('inter', 0)).is_integer())

@each('inter', [-1024, 0, 5, 30000, -32768, 40000, -40000, .5])
@each('signed', [0,1])
def test_every_number(tmp_path, signed, inter, monkeypatch):
    "All of 65536 stored numbers: what int16 cannot hold is cut off, never wrapped around"
    monkeypatch.setattr('covid3d.hu._not_hu', lambda profile: '')  # they are no chest
    sets = sets_of(scan((4,256,256)))
    for ds in sets: ds.PixelData = np.random.default_rng(0).permutation(65536).astype('<u2').tobytes(); ds.PixelRepresentation,ds.RescaleIntercept = signed,str(inter)
    folder = save_all(sets, tmp_path)
    monkeypatch.setattr('covid3d.dicom.to_hu', lambda v: replace(v, data=np.clip(v.data, -1024, 32767)))  # which would say that noise is no chest
    vol = open_series(folder); assert np.array_equal(in_file_order(vol), slice_by_slice(vol)[0])

@each('signed', [0,1])
def test_bits_above_those_stored(tmp_path, signed):
    "Old files keep overlays there; they are no part of the number, for GDCM neither"
    kwargs = dict(bits=12, signed=signed, inter=0 if signed else -1024)
    plain = agrees(save_all(stored(sets_of(), **kwargs), tmp_path/'plain'))
    assert np.array_equal(agrees(save_all(stored(sets_of(), garbage=True, **kwargs), tmp_path/'overlay')).data, plain.data)

@each('kind', native|packed)
@each('signed,bits', [(0,16),(1,16),(0,12)])
def test_encoding(tmp_path, kind, signed, bits):
    sets = stored(sets_of(scan((5,24,20))), bits, signed, inter=0 if signed else -1024)
    vol = agrees(save_all([encode(o, (native|packed)[kind]) for o in sets], tmp_path))
    assert np.array_equal(vol.data, scan((5,24,20)).data)

def test_encodings_mixed_in_one_series(tmp_path):
    sets = sets_of(scan((7,24,20)))
    assert np.array_equal(agrees(save_all([encode(o, k) for o,k in zip(sets, (native|packed).values())], tmp_path)).data, scan((7,24,20)).data)

@each('slopes,inters', [([1]*6,[-1024,-1000,-1024,-1030,-1024,-1050]), ([1,2,1,1,3,1],[-1024]*6), ([1,.5,1.25,1,1,2],[-1024,-1024.5,-1000,-1024,-1024,-1030])])
def test_rescale_of_each_slice(tmp_path, slopes, inters):
    "C11. Compared slice by slice: SimpleITK's series reader would take the first slice's rescale for all in some versions"
    sets = sets_of()
    for ds,a,b in zip(sets, slopes, inters): ds.RescaleSlope,ds.RescaleIntercept = str(a),str(b)
    vol = open_series(save_all(sets, tmp_path))
    voxels,at = slice_by_slice(vol)
    assert np.allclose(in_file_order(vol), voxels, atol=1e-3) and np.allclose(at, [s.position for s in vol.source.slices])

@each('per_frame', [False,True])
@each('kind', ['little','big',*packed])
def test_enhanced(tmp_path, kind, per_frame):
    vol = agrees(save_all([encode(enhanced(sets_of(scan((5,24,20))), per_frame), (native|packed)[kind])], tmp_path))
    assert np.array_equal(vol.data, scan((5,24,20)).data) and np.allclose(vol.affine, scan().affine)

@each('name', ['SP++-','LS-+-','oblique1','oblique5'])
def test_enhanced_orientation(tmp_path, name):
    sets = acquired(rotations()[name])
    classic,multi = (quiet(save_all(o, tmp_path/k)) for k,o in dict(classic=sets, multi=[enhanced(sets)]).items())
    assert np.array_equal(classic.data, multi.data) and np.allclose(classic.affine, multi.affine)
    agrees(tmp_path/'multi')

def test_several_series_in_one_folder(tmp_path):
    "Three series with one prefix of names, in shuffled order: each is what SimpleITK reads under its UID"
    sets = [o for k in range(3) for o in sets_of(scan((5+k,9,7), seed=k), series=k+1)]
    save_all([sets[i] for i in np.random.default_rng(0).permutation(len(sets))], tmp_path)
    found = find_series(tmp_path)
    assert [len(s.slices) for s in found]==[7,6,5]
    for k,s in enumerate(found[::-1]):
        vol = quiet(s.files[2]); same_image(vol, *by_simpleitk(tmp_path, s.uid))
        assert np.array_equal(vol.data, scan((5+k,9,7), seed=k).data)

def test_writing_and_reading_a_volume(tmp_path):
    "`write_series` of what `open_series` gives is the same volume, oblique too"
    vol = quiet(save_all(acquired(rotations()['oblique3']), tmp_path/'a'))
    write_series(Volume(vol.data, vol.affine), tmp_path/'b')
    again = agrees(tmp_path/'b')
    assert np.array_equal(again.data, vol.data) and np.allclose(again.affine, vol.affine, atol=1e-4)

@pytest.mark.skipif(not data, reason='COVID3D_TEST_DATA is not set: the folder of real CTs is not part of the repository')
def test_real_series():
    "79 slices of a GE scanner: SimpleITK, and the NIfTI that others made of them"
    folder = Path(data)/'cip_ct64'
    vol = open_series(folder/'dicom')
    same_image(vol, *by_simpleitk(folder/'dicom'))
    twin = open_scan(folder/'ct.nii.gz')
    assert np.array_equal(vol.data, twin.data) and np.allclose(vol.affine, twin.affine, atol=1e-3)

@pytest.mark.skipif(not data, reason='COVID3D_TEST_DATA is not set: the folder of real CTs is not part of the repository')
@pytest.mark.parametrize('name', ['P001','normal001'])
def test_hospital_series(name):
    "Two scans of a Siemens scanner in JPEG Lossless, whose files are not in the order of the slices: as SimpleITK reads them"
    folder = Path(data)/'covid_ct_md'/name
    if not folder.is_dir(): pytest.skip('covid_ct_md is not there')
    vol = open_series(folder)
    assert vol.shape[1:]==(512,512) and vol.data.dtype==np.int16 and not survey(folder).damaged
    same_image(vol, *by_simpleitk(folder))

# DICOM SEG

def mask_of(vol, empty=False):
    "A mask without symmetry, empty in one slice"
    m = (vol.data>np.median(vol.data)).astype(np.uint8); m[1] = 0
    return m*(not empty)

def seg_of(vol, masks, path, **kwargs):
    save_seg(masks, vol, path, **kwargs)
    return hd.seg.segread(path)

def same_voxels(vol, masks, path):
    "highdicom and pydicom, each on its own, find every mask at its place in the patient"
    seg,plain = hd.seg.segread(path),pydicom.dcmread(path)
    frames = plain.pixel_array.reshape(len(masks), -1, plain.Rows, plain.Columns)
    to_lps = np.diag([-1,-1,1,1])
    for n,(name,m) in enumerate(masks.items(), 1):
        got = seg.get_volume(segment_numbers=[n], combine_segments=False, allow_missing_positions=True)
        x = got.array[...,0] if got.array.ndim==4 else got.array
        index = np.argwhere(m); back = np.rint(nib.affines.apply_affine(np.linalg.inv(to_lps@got.affine)@vol.affine, index)).astype(int) if len(index) else index
        assert x.sum()==m.sum() and (not len(index) or x[tuple(back.T)].all())
        groups = [g for g in plain.PerFrameFunctionalGroupsSequence if g.FrameContentSequence[0].DimensionIndexValues[0]==n]
        for frame,g in zip(frames[n-1], groups): assert np.array_equal(frame, slice_at(m, vol, g.PlanePositionSequence[0].ImagePositionPatient))
    return plain

def slice_at(mask, vol, position):
    "The slice of the mask, in file order, that lies at `position`"
    d = [np.linalg.norm(s.position-np.array(position, float)) for s in vol.source.slices]
    assert min(d)<.01
    return in_file_order(vol.new(mask))[int(np.argmin(d))]

@each('name', rotations())
def test_segmentation_and_report_in_every_orientation(tmp_path, name):
    "The Segmentation has each voxel at its place, and the Structured Report refers to it and to the slices, with the volumes of the masks"
    vol = quiet(save_all(acquired(rotations()[name]), tmp_path/'in')); x = np.arange(vol.shape[2])>3
    masks = dict(lesion=mask_of(vol), right_lung=(vol.data*0+~x).astype(np.uint8), left_lung=(vol.data*0+x).astype(np.uint8))
    seg_of(vol, masks, tmp_path/'seg.dcm'); plain = same_voxels(vol, masks, tmp_path/'seg.dcm')
    save_sr(quantify(Segmentation(vol, masks)), vol, tmp_path/'seg.dcm', tmp_path/'sr.dcm')
    report = hd.sr.srread(tmp_path/'sr.dcm'); groups = report.content.get_volumetric_roi_measurement_groups()
    volumes = {g.tracking_identifier:m.value for g in groups for m in g.get_measurements() if m.name.meaning=='Volume'}
    refs = [g.referenced_segment for g in groups]
    assert {o.referenced_sop_instance_uid for o in refs}=={plain.SOPInstanceUID} and sorted(n for o in refs for n in o.referenced_segment_numbers)==[1,2,3]
    for k in ('right_lung','left_lung'): assert float(volumes[f'covid3d {k}'])==pytest.approx(masks[k].sum()*vol.ml_per_voxel, abs=.00051)
    slices = {o.ReferencedSOPInstanceUID for s in report.CurrentRequestedProcedureEvidenceSequence for r in s.ReferencedSeriesSequence for o in r.ReferencedSOPSequence}
    assert slices=={plain.SOPInstanceUID, *(pydicom.dcmread(p).SOPInstanceUID for p in (tmp_path/'in').iterdir())}

@each('name', ['LP+++','LP---','SP++-','LS-+-','oblique0','oblique1','oblique6'])
@each('kind', ['classic','enhanced'])
def test_segmentation(tmp_path, name, kind):
    "One class, two, and an empty one"
    sets = acquired(rotations()[name])
    vol = quiet(save_all(sets if kind=='classic' else [enhanced(sets)], tmp_path/'in'))
    for masks in (dict(lesion=mask_of(vol)), dict(lesion=mask_of(vol), lung=(vol.data<0).astype(np.uint8)), dict(lesion=mask_of(vol, empty=True)),
                  dict(lung=mask_of(vol), lesion=mask_of(vol, empty=True))):
        seg_of(vol, masks, tmp_path/'seg.dcm')
        plain = same_voxels(vol, masks, tmp_path/'seg.dcm')
        assert [o.SegmentLabel for o in plain.SegmentSequence]==list(masks)

@each('kind', [*native,*packed])
def test_segmentation_of_any_encoding(tmp_path, kind):
    vol = quiet(save_all([encode(o, (native|packed)[kind]) for o in sets_of(scan((5,24,20)))], tmp_path/'in'))
    masks = dict(lesion=mask_of(vol)); seg_of(vol, masks, tmp_path/'seg.dcm'); same_voxels(vol, masks, tmp_path/'seg.dcm')

def test_segmentation_by_simpleitk(tmp_path):
    "A viewer that knows nothing of highdicom: one segment read by ITK, at the scan's place. (GDCM unpacks each frame from a whole byte on, so slices must end on one)"
    vol = quiet(save_all(sets_of(scan((6,8,12))), tmp_path/'in'))
    m = mask_of(vol); save_seg(dict(lesion=m), vol, tmp_path/'out'/'seg.dcm')
    x,affine = by_simpleitk(tmp_path/'out')
    if affine[2,0]<0: x,affine = x[::-1],affine@np.array([[-1,0,0,len(x)-1], [0,1,0,0], [0,0,1,0], [0,0,0,1]])
    assert np.array_equal(x>0, m>0) and np.allclose(affine, vol.affine, atol=1e-4)

# type 1 of the modules that PS3.3 A.51 makes mandatory, and what an archive files by
type1 = '''SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality SeriesNumber FrameOfReferenceUID Manufacturer ManufacturerModelName DeviceSerialNumber
    SoftwareVersions InstanceNumber ContentLabel ContentDate ContentTime ImageType SamplesPerPixel PhotometricInterpretation Rows Columns BitsAllocated BitsStored HighBit
    PixelRepresentation LossyImageCompression SegmentationType SegmentSequence NumberOfFrames SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence
    DimensionOrganizationSequence DimensionIndexSequence ReferencedSeriesSequence PixelData'''.split()
type2 = 'PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName StudyID AccessionNumber ContentDescription ContentCreatorName PositionReferenceIndicator'.split()

@each('kind', ['classic','enhanced'])
def test_segmentation_for_an_archive(tmp_path, kind):
    "Mandatory attributes, the patient and study of the series, a reference to each source instance"
    sets = sets_of()
    sources = sets if kind=='classic' else [enhanced(sets)]
    vol = quiet(save_all(sources, tmp_path/'in'))
    save_seg(dict(lesion=mask_of(vol), lung=(vol.data<0).astype(np.uint8)), vol, tmp_path/'seg.dcm')
    seg = pydicom.dcmread(tmp_path/'seg.dcm')
    assert not [o for o in type1 if o not in seg or seg[o].value in (None,'',[])] and not [o for o in type2 if o not in seg]
    assert (seg.SOPClassUID,seg.Modality,seg.SegmentationType,seg.BitsAllocated,seg.file_meta.TransferSyntaxUID)==('1.2.840.10008.5.1.4.1.1.66.4','SEG','BINARY',1,'1.2.840.10008.1.2.1')
    for k in 'PatientName PatientID PatientBirthDate PatientSex StudyInstanceUID StudyDate StudyID AccessionNumber FrameOfReferenceUID'.split(): assert seg[k].value==sources[0][k].value, k
    assert seg.SeriesInstanceUID!=sources[0].SeriesInstanceUID and seg.file_meta.MediaStorageSOPInstanceUID==seg.SOPInstanceUID
    refs = seg.ReferencedSeriesSequence[0]
    assert refs.SeriesInstanceUID==sources[0].SeriesInstanceUID
    assert sorted(o.ReferencedSOPInstanceUID for o in refs.ReferencedInstanceSequence)==sorted(o.SOPInstanceUID for o in sources)
    assert len(seg.PerFrameFunctionalGroupsSequence)==seg.NumberOfFrames==12 and len(seg.PixelData)==(12*9*7+15)//16*2
    pydicom.dcmwrite(io.BytesIO(), seg, enforce_file_format=True)

def test_segmentation_codes(tmp_path):
    "Category and type of every class are SNOMED CT codes that pydicom's own dictionary (from PS3.16) holds under this meaning"
    vol = quiet(save_all(sets_of(), tmp_path/'in'))
    own = ((codes.SCT.AnatomicalStructure.value,'SCT','Anatomical Structure'),(codes.SCT.Heart.value,'SCT','Heart'))
    save_seg(dict.fromkeys([*seg_codes,'heart','blob'], mask_of(vol)), vol, tmp_path/'seg.dcm', codes=dict(heart=own))
    known = {(c.value,c.scheme_designator,c.meaning) for n in codes.SCT.dir() for c in [getattr(codes.SCT, n)]}
    tissue = (('85756007','SCT','Tissue'),)*2  # a name that is not known makes no claim
    for seg,(category,kind) in zip(pydicom.dcmread(tmp_path/'seg.dcm').SegmentSequence, [*seg_codes.values(),own,tissue], strict=True):
        for got,want in ((seg.SegmentedPropertyCategoryCodeSequence[0],category), (seg.SegmentedPropertyTypeCodeSequence[0],kind)):
            assert (got.CodeValue,got.CodingSchemeDesignator,got.CodeMeaning)==want and want in known
        assert seg.SegmentAlgorithmType=='AUTOMATIC' and 'covid3d' in seg.SegmentAlgorithmName
        side = seg.SegmentedPropertyTypeCodeSequence[0].get('SegmentedPropertyTypeModifierCodeSequence')
        assert (side and side[0].CodeMeaning)==dict(right_lung='Right', left_lung='Left').get(seg.SegmentLabel) and (not side or (side[0].CodeValue,'SCT',side[0].CodeMeaning) in known)

@each('dtype', [np.uint8,bool,np.int64,np.float32])
def test_segmentation_of_any_type(tmp_path, dtype):
    vol = quiet(save_all(sets_of(), tmp_path/'in'))
    masks = dict(lesion=mask_of(vol)); save_seg({k:m.astype(dtype) for k,m in masks.items()}, vol, tmp_path/'seg.dcm'); same_voxels(vol, masks, tmp_path/'seg.dcm')

def test_segmentation_of_every_shape(tmp_path):
    "Bits are packed across the frames: shapes whose slices do not end on a byte"
    for shape in ((4,5,5),(5,7,9),(4,8,8),(7,11,13),(9,16,4)):
        vol = quiet(save_all(sets_of(scan(shape)), tmp_path/str(shape)))
        masks = dict(lesion=mask_of(vol), lung=(vol.data<-500).astype(np.uint8)); save_seg(masks, vol, tmp_path/'seg.dcm'); same_voxels(vol, masks, tmp_path/'seg.dcm')

def test_segmentation_after_a_repeat_was_left_out(tmp_path):
    sets = sets_of(); twice = meta(sets[2], native['little']); twice.SOPInstanceUID = '1.2.3.4'
    vol = open_series(save_all([*sets,twice], tmp_path/'in'))
    masks = dict(lesion=mask_of(vol)); save_seg(masks, vol, tmp_path/'seg.dcm'); plain = same_voxels(vol, masks, tmp_path/'seg.dcm')
    refs = {o.ReferencedSOPInstanceUID for o in plain.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert refs=={o.SOPInstanceUID for o in sets}  # the instances that stayed
    assert [s.uids for s in vol.source.slices if s.repeats]==[(sets[2].SOPInstanceUID,'1.2.3.4')]

def fails(pattern, masks, vol, path):
    with pytest.raises(CTError, match=pattern) as e: save_seg(masks, vol, path)
    assert '\n' not in str(e.value) and not Path(path).exists()

def test_segmentation_that_cannot_be(tmp_path):
    vol,out = quiet(save_all(sets_of(), tmp_path/'in')),tmp_path/'seg.dcm'
    m = mask_of(vol)
    fails('no masks', {}, vol, out); fails('is not 0 and 1', dict(lesion=m*2), vol, out); fails('is not 0 and 1', dict(lesion=m*np.nan), vol, out); fails('the scan', dict(lesion=m[1:]), vol, out)
    fails('not read from DICOM', dict(lesion=m), Volume(vol.data, vol.affine), out)

def test_segmentation_of_frames_of_two_files(tmp_path):
    "highdicom takes one multi-frame source: refused, not misplaced"
    sets = sets_of(); parts = [enhanced(sets[:3]),enhanced(sets[3:])]
    vol = quiet(save_all(parts, tmp_path/'in'))
    assert np.array_equal(vol.data, scan().data)
    fails('not all the frames of one file', dict(lesion=mask_of(vol)), vol, tmp_path/'seg.dcm')

def test_segmentation_of_instances_with_one_uid(tmp_path):
    sets = sets_of(); sets[3].SOPInstanceUID = sets[2].SOPInstanceUID
    vol = quiet(save_all(sets, tmp_path/'in'))
    fails('one SOPInstanceUID', dict(lesion=mask_of(vol)), vol, tmp_path/'seg.dcm')

@each('name', ['StudyInstanceUID','PatientID','FrameOfReferenceUID','StudyDate','PatientSex'])
def test_segmentation_of_a_stripped_series(tmp_path, name):
    "Anonymisers remove elements: written without, or refused by the element's name"
    sets = sets_of()
    for ds in sets: delattr(ds, name)
    vol = quiet(save_all(sets, tmp_path/'in'))
    masks = dict(lesion=mask_of(vol))
    try: save_seg(masks, vol, tmp_path/'seg.dcm')
    except CTError as e: assert str(e).startswith(str(tmp_path/'in')) and name in str(e)
    else: same_voxels(vol, masks, tmp_path/'seg.dcm')

def test_segmentation_when_the_series_is_gone(tmp_path):
    vol = quiet(save_all(sets_of(), tmp_path/'in'))
    (tmp_path/'in'/'IM002.dcm').unlink()
    fails('cannot be read', dict(lesion=mask_of(vol)), vol, tmp_path/'seg.dcm')

def test_quiet_until_the_last_thread_is_done():
    "Two threads in pydicom at once: the first to leave does not let the second one's remarks out, and then all is as it was"
    from covid3d.dicom import QuietDicom
    log,was = logging.getLogger('pydicom'),(logging.getLogger('pydicom').level,pydicom.config.settings.reading_validation_mode,list(warnings.filters))
    first,second = QuietDicom(),QuietDicom()
    first.__enter__(); second.__enter__(); first.__exit__()
    with warnings.catch_warnings(record=True) as said: warnings.warn('DOE^JANE')
    assert not said and not log.isEnabledFor(logging.CRITICAL)
    second.__exit__()
    assert (log.level,pydicom.config.settings.reading_validation_mode,list(warnings.filters))==was

def test_threads_read_alike(tmp_path):
    "Many readings at once, of plain and of compressed series, none of which sees the others"
    folders = [save_all([encode(o, syntax) for o in sets_of()], tmp_path/k) for k,syntax in (native|packed).items()]
    with ThreadPoolExecutor(4) as pool: vols = list(pool.map(open_series, folders*3))
    assert all(np.array_equal(v.data, scan().data) and not v.notes for v in vols)
