"Scores equal independent oracles, intervals hold what they promise, tests err as often as they say, and a report is whole, safe and readable"
import base64, errno, gc, json, math, os, resource, subprocess, sys, warnings, weakref, zlib
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import matplotlib; matplotlib.use('Agg')
import numpy as np, pandas as pd, pytest, surface_distance, torch
from scipy import ndimage, stats
from sklearn import metrics as skm
from torch import nn

from covid3d import score_page
from covid3d.cases import Case, read_cases
from covid3d.datasets import folder
from covid3d.evaluate import Journal, _pack, _pair_digest, _row_from, _Unkept, _unpack, class_note, evaluate_cases, read_journal, score_case, score_cases, seen_note
from covid3d.files import to_json
from covid3d.inference import Segmenter
from covid3d.score_page import Extremes, snapshot, write_report
from covid3d.metrics import score_names
from covid3d.statistics import (_pairs, _quantiles, _ratio, _ratio_se, agreement, case_counts, check_same_cases, compare, compare_all, difference_line, fmt, headline, holm, label_of, least_patients,
    many, mean_interval, paired_tests, per_patient, ratio_interval, read_others, read_scores, row_names, score_labels, score_masks, score_table, scores_csv, span, summarise)
from covid3d.transforms import CTSpec
from covid3d.volume import CTError, Volume, canonical_affine, write_atomic
from coarse import write_coarse

class Band(nn.Module):
    "Calls a band of grey a lesion"
    def __init__(self, low=.2, high=.44): super().__init__(); self.band = nn.Parameter(torch.tensor([low,high]))
    def forward(self, x): return 100*torch.minimum(x-self.band[0], self.band[1]-x)

spec = CTSpec(spacing=(9,3.7,3.7), patch=(16,96,96))

@pytest.fixture(scope='module')
def cases(tmp_path_factory): return read_cases(write_coarse(tmp_path_factory.mktemp('phantoms'), n=4, seed=6, shape=(24,64,72), spacing=(12,5.5,5)))

def oracle(pred, mask, spacing):
    "The scores by scikit-learn, SciPy and DeepMind's surface-distance"
    p,m = pred.ravel(),mask.ravel()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); d = surface_distance.compute_surface_distances(mask, pred, spacing)
    (lp,np_),(lm,nm) = (ndimage.label(o, np.ones((3,3,3))) for o in (pred,mask))
    right,found = sum(mask[lp==i+1].any() for i in range(np_))/np_,sum(pred[lm==i+1].any() for i in range(nm))/nm
    ml = np.prod(spacing)/1000
    return dict(dice=skm.f1_score(m,p), jaccard=skm.jaccard_score(m,p), precision=skm.precision_score(m,p), recall=skm.recall_score(m,p), specificity=skm.recall_score(m,p,pos_label=0),
        hd95=surface_distance.compute_robust_hausdorff(d,95), nsd=surface_distance.compute_surface_dice_at_tolerance(d,3.), lesion_precision=right, lesion_recall=found,
        lesion_f1=2*right*found/(right+found) if right+found else 0, volume_error_ml=(p.sum()-m.sum())*ml, volume_error_pct=100*(p.sum()-m.sum())/m.sum(),
        reference_ml=m.sum()*ml, predicted_ml=p.sum()*ml)

def equals_oracle(row, pred, mask, spacing):
    for k,v in oracle(pred, mask, spacing).items(): assert row[k]==pytest.approx(v, rel=1e-5, abs=1e-7), k

def test_every_score_equals_its_oracle(cases):
    "A network, a whole scan, its own grid"
    for case in cases:
        seen = {}
        row = score_case(Segmenter(Band(), spec), case, each=lambda row,ct,pred,mask: seen.update(pred=pred>0, mask=mask>0, ct=ct))
        assert seen['pred'].shape==case.open_ct().shape and seen['pred'].any()
        assert (seen['pred']==(Segmenter(Band(), spec)(case).masks['lesion']>0)).all()
        equals_oracle(row, seen['pred'], seen['mask'], seen['ct'].spacing)

@pytest.mark.parametrize('seed', range(8))
def test_scores_of_given_masks_equal_their_oracle(seed):
    rng = np.random.default_rng(seed); spacing = [(1.,1.,1.),(5.,.7,.8),(8.,.6,.6)][seed%3]
    pred,mask = (ndimage.gaussian_filter(rng.standard_normal((10,30,28)), 1.5)>.08 for _ in range(2))
    equals_oracle(score_masks(Case('a',None), Volume(np.zeros(pred.shape,np.int16), canonical_affine(spacing)), pred, mask), pred, mask, spacing)

@pytest.mark.skipif(not os.environ.get('COVID3D_TEST_DATA'), reason='COVID3D_TEST_DATA is not set: the folder of real CTs is not part of the repository')
def test_real_scan_equals_the_oracle():
    df = folder(Path(os.environ['COVID3D_TEST_DATA'])/'coronacases_7', test=['coronacases_004'], already_windowed='-1000:20')
    case, = read_cases(df, 'test'); seen = {}
    row = score_case(Segmenter(Band(.3,.6), CTSpec(spacing=(4,2.8,2.8), patch=(16,96,96)), 0.), case, each=lambda row,ct,pred,mask: seen.update(pred=pred>0, mask=mask>0, ct=ct))
    equals_oracle(row, seen['pred'], seen['mask'], seen['ct'].spacing)

@pytest.mark.fault('X14')
@pytest.mark.promise('lost')
def test_one_bad_case_never_stops_a_cohort(cases, tmp_path):
    "A damaged file, a scan of another kind, a network that breaks on one scan: each is a line; Ctrl-C still stops"
    broken = tmp_path/'broken.nii.gz'; broken.write_bytes(b'\x1f\x8b no')
    class Breaks(Band):
        def forward(self, x):
            if self.bad: raise RuntimeError('first line\nsecond line')
            return super().forward(x)
    m = Breaks(); m.bad = False
    bad = Case('broken', broken, cases[0].masks),Case('gone', tmp_path/'gone.nii', cases[0].masks),Case('unlabelled', cases[0].ct),Case('other_grid', cases[0].ct, dict(lesion=broken))
    df = score_cases(Segmenter(m, spec), [cases[0],*bad,cases[1]])
    assert (df.error!='').tolist()==[False]+[True]*4+[False] and not df.error.str.contains('\n').any() and df.dice.notna().tolist()==[True]+[False]*4+[True]
    assert case_counts(df)['failed']==4 and '4 failed' in headline(df) and summarise(df).loc['dice','n']==2
    m.bad = True
    assert 'first line second line' in score_cases(Segmenter(m, spec), cases[:1]).error[0]
    class Stop(Band):
        def forward(self, x): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): score_cases(Segmenter(Stop(), spec), cases)

@pytest.mark.fault('X15')
@pytest.mark.promise('named')
@pytest.mark.parametrize('resolved', [True,False])
def test_no_path_leaves_with_a_report(cases, tmp_path, monkeypatch, resolved):
    "The folder of a DICOM series can be a patient's name; the case's name and the file's role stand in its place"
    monkeypatch.chdir(tmp_path); home = tmp_path/'DOE^JANE 1950'; (home/'study').mkdir(parents=True); (home/'mask_DOE.nii.gz').write_bytes(b'\x1f\x8b no')
    for i in range(2): (home/'study'/f'DOE_{i}.dcm').write_bytes(b'no DICOM')
    if not resolved: home = home.relative_to(tmp_path)
    class Fails(Band):
        def forward(self, x): raise OSError(5, 'Input/output error', str(Path('DOE^JANE 1950').resolve()/'study'/'DOE_1.dcm'))
    good = cases[0]; mask = home/'mask_DOE.nii.gz'
    bad = [Case('c1', home/'study', good.masks),Case('c2', good.ct, dict(lesion=mask)),Case('c3', home/'gone.nii.gz', good.masks),Case('c4', home/'study'/'DOE_1.dcm', good.masks)]
    df = pd.concat([score_cases(Segmenter(Band(), spec), bad), score_cases(Segmenter(Fails(), spec), [Case('c5', good.ct, good.masks)])], ignore_index=True)
    assert (df.error!='').all() and df.error[0].startswith('c1 (scan): ') and df.error[1].startswith('c2 (lesion mask): ') and df.error[2]=='c3 (scan): no such file. Check the path.'
    at = write_report(df, tmp_path/'r')
    for f in ('index.html','scores.csv','report.json'):
        text = (at.parent/f).read_text(); assert not any(o in text for o in ('DOE','JANE',str(tmp_path),str(good.ct.parent))), (f,df.error.tolist())

@pytest.mark.fault('D14')
def test_one_scan_in_memory(cases):
    "When a case is scored, nothing of the former ones is alive, pictures included"
    alive,keep = [],Extremes(1)
    def each(row, ct, pred, mask):
        gc.collect(); assert all(r() is None for r in alive)
        alive.extend(weakref.ref(o) for o in (ct.data,pred,mask)); keep(row, ct, pred, mask)
    score_cases(Segmenter(Band(), spec), cases, each=each)
    assert len(alive)==12 and len(keep.kept)==2 and all(o.img.base is None and o.img.ndim==2 for o in keep.kept)

# intervals

def made_up(rng, *shape): return 1/(1+np.exp(-rng.normal(1.2, 1.1, shape)))
true_mean = made_up(np.random.default_rng(99), 10**6).mean()

def within(share, p, n, sigma=3.3): return abs(share-p)<=sigma*math.sqrt(p*(1-p)/n)

@pytest.mark.parametrize('n', [7,20])
def test_coverage(n, studies=500):
    "95 % intervals hold the true mean in 95 % of studies; SciPy's percentile interval does not at 7 patients"
    rng,hit,percentile = np.random.default_rng(n),0,0
    for _ in range(studies):
        x = made_up(rng, n)
        low,high = ratio_interval(x, np.ones(n), (0,1), resamples=599); hit += low<=true_mean<=high
        p = stats.bootstrap((x,), np.mean, method='percentile', n_resamples=599, vectorized=True, rng=0).confidence_interval; percentile += p.low<=true_mean<=p.high
    assert within(hit/studies, .95, studies), hit/studies
    if n==7: assert not within(percentile/studies, .95, studies), percentile/studies

def test_coverage_over_patients(studies=400):
    "Several scans of a patient: drawing patients holds, drawing scans fails"
    rng,hit = np.random.default_rng(0),np.zeros(2)
    for _ in range(studies):
        n = rng.integers(1,9,12); who = np.repeat(np.arange(12), n)
        x = 1/(1+np.exp(-(1.2+1.1*(math.sqrt(.7)*rng.normal(size=12)[who]+math.sqrt(.3)*rng.normal(size=len(who))))))
        for i,w in enumerate((who, np.arange(len(who)))):
            low,high = ratio_interval(*per_patient(w, x, np.ones(len(x))), (0,1), resamples=499); hit[i] += low<=true_mean<=high
    patients,scans = hit/studies
    assert within(patients, .95, studies, 4) and scans<.8, hit/studies

@pytest.mark.parametrize('seed', range(4))
def test_interval_equals_scipys(seed):
    "One scan a patient: SciPy's bootstrap of the t statistic, turned around"
    x = made_up(np.random.default_rng(seed), 6+7*seed); m,se = x.mean(),stats.sem(x)
    q = stats.bootstrap((x,), lambda o, axis: (o.mean(axis)-m)/stats.sem(o, axis), method='percentile', n_resamples=4999, rng=0, batch=999).confidence_interval
    assert ratio_interval(x, np.ones(len(x)))==pytest.approx((m-se*q.high,m-se*q.low), rel=1e-9)

def test_interval_at_the_edges():
    every = lambda x, n=None, b=(0,1): ratio_interval(x, np.ones(len(x)), b, least=0)
    assert np.isnan(every([.4])).all() and np.isnan(every([])).all()
    assert every([0,0,0])==(0,0) and every([0,1])==(0,1)
    low,high = every([0]*9+[.9]); assert 0<=low<=.09<=high<=1
    assert every([.2,.5,.9])==every([.2,.5,.9])

@pytest.mark.promise('silent')
@pytest.mark.parametrize('n', range(1,9))
def test_no_interval_below_six_patients(tmp_path, n):
    "Not in the summary, headline, page, comparison or picture, and the reason is told; from six on there is one"
    t = pd.concat([table('near')]*2*n).assign(case=[f'c{i}' for i in range(2*n)], patient=[f'p{i//2}' for i in range(2*n)], dice=np.linspace(.2,.9,2*n))
    a,none = score_table(t),n<least_patients
    assert least_patients==6 and np.isnan(mean_interval(a.dice, a.patient, (0,1))).all()==none and np.isnan(summarise(a).loc[['dice','pooled_dice'],['low','high']]).all(axis=None)==none
    assert ('no interval: fewer than 6 patients' in headline(a))==none and np.isnan(compare(a, a.assign(dice=a.dice/2))['low'])==none
    text = said(write_report(a, tmp_path/'r'))
    assert ('no interval: fewer than 6 patients' in text)==none and '0.000 to 1.000' not in text and 'Below 6 patients there is none' in text

@pytest.mark.parametrize('seed', range(20))
def test_holm_by_definition(seed):
    "An adjusted p is the smallest level at which the step-down procedure rejects, and is never below Holm's first step nor above Bonferroni"
    rng = np.random.default_rng(seed); p = rng.choice(np.stack([rng.random(7)**3, rng.random(7)]))[:rng.integers(1,8)].round(2)
    def rejected(level):
        left = sorted(range(len(p)), key=lambda i: p[i])
        while left and p[left[0]]*len(left)<=level+1e-12: left.pop(0)
        return {*range(len(p))}-{*left}
    adjusted = np.array(holm(p))
    for level in (*adjusted, *(adjusted-1e-6), .05, .2): assert {i for i,a in enumerate(adjusted) if a<=level+1e-12 and level<1}=={i for i in rejected(level) if level<1}
    assert (adjusted>=p-1e-12).all() and (adjusted<=np.minimum(1, p*len(p))+1e-12).all()

def test_the_comparisons_of_a_page_are_corrected_together(tmp_path):
    "Three scores with two other models are six comparisons; each row has Holm's p, and the page says what the sign-flip test assumes"
    a,b = pair(np.linspace(.02,.12,8)); a,b = (o.assign(nsd=o.dice, lesion_f1=o.dice**2, tolerance_mm=3.) for o in (a,b))
    found = compare_all(a, dict(x=b, y=b.assign(dice=b.dice-.01))); made = [c for o in found.values() for c in o]
    assert [c['p_holm'] for c in made]==pytest.approx(holm([c['p'] for c in made])) and {c['family'] for c in made}=={6} and made[0]['p_holm']==pytest.approx(6*2/2**8)
    text = said(write_report(a, tmp_path/'r', against=dict(x=b, y=b)))
    assert 'exact only if differences are symmetric about 0' in text and 'corrected for the 6 comparisons' in text and 'share a network' in text

def test_summary_equals_pandas_and_pools_voxels():
    rng = np.random.default_rng(1); n = 9
    c = rng.integers(10,1000,(n,4)); d = 2*c[:,0]/(2*c[:,0]+c[:,1]+c[:,2])
    df = score_table(dict(case=[f'c{i}' for i in range(n)], patient=['p0','p0',*map(str,range(n-2))], dice=d, tp=c[:,0], fp=c[:,1], fn=c[:,2], tn=c[:,3], empty='', error=''))
    t = summarise(df)
    q = pd.Series(d).describe()
    assert t.loc['dice',['n','mean','sd','median','q1','q3']].tolist()==pytest.approx([q[k] for k in ('count','mean','std','50%','25%','75%')], rel=1e-12)
    tp,fp,fn,_ = c.sum(0); assert t.loc['pooled_dice','mean']==pytest.approx(2*tp/(2*tp+fp+fn), rel=1e-12) and t.loc['dice','patients']==n-1
    assert t.loc['dice','low']<t.loc['dice','mean']<t.loc['dice','high'] and t.loc['pooled_dice','low']<t.loc['pooled_dice','mean']<t.loc['pooled_dice','high']

def test_a_scan_counted_four_times_is_no_new_evidence():
    df = score_table([dict(r, case=f'c{i}', patient=f'p{i}') for i,r in enumerate(table(*['near','good','mask','near','pred']*2).to_dict('records'))])
    t,four = summarise(df),summarise(pd.concat([df.assign(case=df.case+k) for k in 'abcd']))
    cols = ['patients','infinite','mean','low','high']; assert four.loc['dice','n']==4*len(df)
    pd.testing.assert_frame_equal(t[cols].drop(columns='infinite'), four[cols].drop(columns='infinite'), rtol=1e-9)

def masks(kind):
    z = np.zeros((8,12,12),bool); m = z.copy(); m[2:5,3:8,3:8] = True
    return dict(both=(z,z), mask=(m,z), pred=(z,m), good=(m,m), near=(np.roll(m,1,1),m))[kind]
grid = Volume(np.zeros((8,12,12),np.int16), canonical_affine((5,1,1)))
def table(*kinds, names=None): return score_table([score_masks(Case(n,None), grid, *masks(k)) for n,k in zip(names or kinds, kinds)])

@pytest.mark.fault('P6')
@pytest.mark.promise('silent')
def test_empty_masks_are_counted_and_never_flatter(tmp_path):
    "Missing a lesion, or inventing one, makes no score better; a scan with nothing in it changes none"
    good,t = summarise(table('near','good')),lambda *k: summarise(table('near','good',*k))
    assert good.equals(t('both')) and case_counts(table('near','both'))['both_empty']==1
    for k in ('mask','pred'):
        worse = t(k)
        for s in ('dice','nsd','recall','precision','lesion_f1','jaccard'): assert worse.loc[s,'mean']<good.loc[s,'mean'], (k,s)
        for s in ('hd95','assd'): assert worse.loc[s,'mean']==math.inf and math.isfinite(worse.loc[s,'median']) and worse.loc[s,'infinite']==1 and math.isnan(worse.loc[s,'low'])
    text = said(write_report(table('near','both','mask','pred'), tmp_path))
    assert 'Both masks empty: 1 case.' in text and 'One mask empty: 2 cases (1 false alarm: empty reference; 1 miss: empty prediction)' in text

# two models

def pair(diff, who=None, base=.4):
    n = len(diff); who = [f'p{i}' for i in range(n)] if who is None else who
    one = lambda d: score_table(dict(case=[f'c{i}' for i in range(n)], patient=who, dice=d, tp=5, fp=1, fn=1, tn=9, empty='', error=''))
    b = base+.03*np.arange(n)
    return one(b+np.asarray(diff)),one(b)

@pytest.mark.parametrize('n', [5,8,11])
def test_sign_flips_by_hand(n):
    d = np.random.default_rng(n).normal(.3, 1, n)
    flips = np.array(list(product((-1,1), repeat=n)))@d
    r = paired_tests(d, np.ones(n))
    assert r['p']==pytest.approx((np.abs(flips)>=abs(d.sum())-1e-12).mean(), abs=1e-12) and r['p_least']==2.**(1-n)
    assert r['p']==pytest.approx(stats.permutation_test((d,), np.mean, permutation_type='samples', n_resamples=np.inf, vectorized=True).pvalue, abs=1e-12)
    assert r['p_wilcoxon']==pytest.approx(stats.wilcoxon(d).pvalue, abs=1e-12)

def test_false_positives_and_power(studies=400):
    "Two equal models: p ≤ 0.05 in at most 5 % of studies. An effect of one sd and 12 patients: found in most"
    rng = np.random.default_rng(5)
    null = np.mean([paired_tests(rng.standard_t(3, 9), np.ones(9))['p']<=.05 for _ in range(studies)])
    real = np.mean([paired_tests(rng.normal(1, 1, 12), np.ones(12))['p']<=.05 for _ in range(studies//4)])
    assert null<=.05+3.3*math.sqrt(.05*.95/studies) and null>.015 and real>.75, (null,real)

def test_scans_of_a_patient_are_no_independent_witnesses(studies=300):
    "Over patients the error rate holds; flipping scans one by one finds differences that are not there"
    rng,hit = np.random.default_rng(2),np.zeros(2)
    for _ in range(studies):
        who = np.repeat(np.arange(8), 4); d = rng.normal(size=8)[who]+.4*rng.normal(size=32)
        hit += [paired_tests(*per_patient(w, d, np.ones(32)))['p']<=.05 for w in (who, np.arange(32))]
    patients,scans = hit/studies
    assert patients<=.05+3.3*math.sqrt(.05*.95/studies) and scans>.15, hit/studies

@pytest.mark.parametrize('nonzero,zero', [(3,0),(3,4),(1,5),(0,4),(12,3),(5,20)])
def test_a_difference_of_0_is_no_witness(tmp_path, nonzero, zero):
    "The smallest p that is promised is reached by the clearest result there can be, and by none below it"
    r = paired_tests(np.r_[np.zeros(zero),np.arange(1.,nonzero+1)], np.ones(nonzero+zero))
    assert r['p']==pytest.approx(r['p_least'], rel=1e-9) and r['differing']==nonzero
    a,b = pair(.01*np.r_[np.zeros(zero),np.arange(1.,nonzero+1)])
    assert ('no result can fall below 0.05' in said(write_report(a, tmp_path, against=dict(b=b))))==(nonzero<6)

def test_many_patients_use_random_flips():
    assert paired_tests(np.ones(30), np.ones(30))['p']==pytest.approx(paired_tests(np.ones(30), np.ones(30))['p_least'])==pytest.approx(2/5000)
    d = np.random.default_rng(0).normal(.1, 1, 40)
    assert paired_tests(d, np.ones(40))['p']==pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=.03)

def test_compare_pairs_by_name():
    a,b = pair([.1,.2,-.05,.1,.3,.02])
    c = compare(a, b.sample(frac=1, random_state=0))
    assert c['difference']==pytest.approx(.67/6) and c==compare(a, b) and c['p']==pytest.approx(paired_tests(np.array([.1,.2,-.05,.1,.3,.02]), np.ones(6))['p']) and c['low']<c['difference']<c['high'] and c['n']==c['patients']==6
    assert compare(*pair([.1], ['a']))['p']==1                   # one patient: no test, no error
    two = compare(*pair([.1,.2,-.05,.1,.3,.02], list('aabbcc'))); assert two['patients']==3 and two['p_least']==.25 and two['p']>=.25

def test_compare_refuses_what_is_no_pair():
    a,b = pair([.1,.2,.3])
    with pytest.raises(CTError, match='compare: the tables hold different cases, only in the first: c2. Score both models on the same cases.'): compare(a, b.iloc[:2])
    with pytest.raises(CTError, match='only in the first: c0, c1, c2; only in the second: x0'): compare(a, b.assign(case=['x0','x1','x2']))
    with pytest.raises(CTError, match="case 'c0' appears twice"): compare(a, b.assign(case='c0'))
    with pytest.raises(CTError, match="case 'c1' was scored against another reference"): compare(a, b.assign(tp=[5,6,5]))
    with pytest.raises(CTError, match='infinite where a mask is empty'): compare(table('good','pred'), table('good','pred'), 'hd95')
    with pytest.raises(CTError, match='no case has a score in both tables'): compare(table('both'), table('both'))
    with pytest.raises(CTError, match="score: 'f1' is unknown"): compare(a, b, 'f1')
    assert compare(table('good','near','both'), table('good','near','both'))['left_out']==['both']

# files

nasty = ['=HYPERLINK("http://x")','<script>alert(1)</script>','"><img src=x onerror=alert(1)>','a,b;c','+1','@x','-cmd|calc','ü 肺','&amp;',"it's"]

class Page(HTMLParser):
    "Tags, attributes and text of a page; complains of tags that are not closed"
    def __init__(self, html): super().__init__(); self.tags,self.open,self.said = [],[],[]; self.feed(html); assert not self.open, self.open
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag,dict(attrs)))
        if tag not in ('meta','img','br'): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop()==tag
    def handle_data(self, s): self.said.append(s)

def said(at):
    "The text of a page"
    return ' '.join(Page(at.read_text()).said)

def cohort(names=nasty):
    t = table(*(['near','good','pred','both','mask']*2)[:len(names)], names=names)
    return score_table([*t.to_dict('records')[:-1], dict(case=names[-1], error='<b>=1+1</b>')])

@pytest.mark.fault('S6')
@pytest.mark.promise('executed')
def test_nothing_in_a_report_runs(tmp_path):
    "A report runs no script, whatever cases, titles and folders are called"
    keep = Extremes(2)
    for n in nasty[:4]: keep(dict(case=n, dice=.5), grid, *masks('near'))
    df = cohort(); at = write_report(df, tmp_path/'r', nasty[1], keep, {nasty[2]:df}, {nasty[1]:nasty[2]}, name=nasty[1])
    page = Page(at.read_text()); text = ' '.join(page.said)
    assert not {'script','iframe','object','link','form','a'}&{t for t,_ in page.tags}
    for t,a in page.tags:
        assert not any(k.startswith('on') for k in a) and (t!='img' or set(a)=={'alt','src'} and a['src'].startswith('data:image/png;base64,'))
    assert all(n in text for n in nasty) and '<b>=1+1</b>' in text and 'url(' not in at.read_text() and '@import' not in at.read_text()
    for f in ('scores.csv','summary.csv'): assert not any(c[:1] in ('=','+','@') or c.startswith('-cmd') for line in (tmp_path/'r'/f).read_text().splitlines() for c in line.replace('"','').split(','))
    assert read_scores(tmp_path/'r').case.tolist()==nasty
    assert {o.name for o in at.parent.iterdir()}=={'covid3d.json','index.html','scores.csv','summary.csv','report.json','scores.png','volumes.png','worst_1.png','worst_2.png','best_1.png','best_2.png'}

def test_report_says_what_the_table_says(tmp_path):
    df = cohort([f'case_{i}' for i in range(10)]); at = write_report(df, tmp_path/'r')
    text,t,n = said(at),summarise(df),case_counts(df)
    js = json.loads((at.parent/'report.json').read_text(), parse_constant=lambda s: pytest.fail(f'{s} is no JSON'))
    assert js['summary']['dice']['mean']==t.loc['dice','mean'] and js['summary']['hd95']['mean']=='inf' and js['counts']==case_counts(df) and js['tolerance_mm']==3
    sentences = [f'10 cases of 10 patients; {n["scored"]} scored. Failed, and not counted in any figure: {n["failed"]}.', f'Both masks empty: {many(n["both_empty"],"case")}.',
        f'({many(n["false_alarms"],"false alarm")}: empty reference; {many(n["misses"],"miss","misses")}: empty prediction). They count with the worst value',
        'on the grid of its own scan, voxel by voxel', 'bootstrap-t (4,999 resamples) of the mean over patients', 'rest on the spacing that each file states', 'pooled Dice gives it to each voxel']
    assert f'{t.loc["dice","mean"]:.3f}' in text and all(s in text for s in sentences) and 'Surface Dice at 3 mm' in text and '∞' in text
    s = pd.read_csv(at.parent/'summary.csv').set_index('score'); assert s.index.tolist()==t.index.tolist() and s.loc['nsd','mean']==pytest.approx(t.loc['nsd','mean'], rel=1e-5)
    assert ' 1 mm' in said(write_report(df.assign(tolerance_mm=1.), tmp_path/'one'))

def test_scores_survive_a_file(tmp_path):
    df = cohort(); df.loc[0,'tn'] = 2**40+1
    write_atomic(tmp_path/'s.csv', scores_csv(df)); back = read_scores(tmp_path/'s.csv')
    pd.testing.assert_frame_equal(back, df, check_exact=True); assert back.tn[0]==2**40+1
    assert summarise(back).equals(summarise(read_scores(tmp_path/'s.csv')))
    for text,match in (('case,dice\na,1\n','the column tp, fp, fn, empty, error is missing'),('','not a table of scores'),('case,dice,tp,fp,fn,empty,error\na,x,1,1,1,,\n','not a table of scores|is not a number')):
        (tmp_path/'bad.csv').write_text(text)
        with pytest.raises(CTError, match=match): read_scores(tmp_path/'bad.csv')
    (tmp_path/'bad.csv').write_bytes(b'\xff\xfe\0\0'); pytest.raises(CTError, read_scores, tmp_path/'bad.csv'); pytest.raises(CTError, read_scores, tmp_path/'none.csv')

def test_a_table_equals_its_own_file(tmp_path):
    d = np.random.default_rng(0).random(40); df = score_table(dict(case=[f'c{i}' for i in range(40)], dice=d, hd95=100*d, tp=5, fp=1, fn=1, tn=9, empty='', error=''))
    write_atomic(tmp_path/'s.csv', scores_csv(df))
    for k in ('dice','hd95'): c = compare(df, read_scores(tmp_path/'s.csv'), k); assert (c['difference'],c['low'],c['high'],c['p'],c['p_wilcoxon'])==(0,0,0,1,1)

def test_one_score_without_comparison_costs_no_other(tmp_path):
    a = table('near','good','pred'); b = a.assign(tolerance_mm=1.)
    text = said(write_report(a, tmp_path/'r', against=dict(other=b)))
    assert 'Surface Dice: compare: the surface Dice has two tolerances' in text and 'Paired by case' in text
    assert [c.get('p') for c in json.loads((tmp_path/'r'/'report.json').read_text())['compare']['other']]==[1,None,1]

def test_minus_infinity_keeps_its_sign(): assert fmt(-math.inf,'volume_error_ml')=='−∞' and fmt(math.inf,'hd95')=='∞' and fmt(-math.inf, sign=True)=='−∞'

def test_the_patients_of_the_headline_are_those_of_its_cases():
    df = table('near','good','both'); assert case_counts(df)['patients']==2 and '2 cases of 2 patients' in headline(df)

@pytest.mark.fault('X1')
@pytest.mark.promise('lost')
@pytest.mark.parametrize('name', ['index.html','scores.csv','summary.csv','report.json','scores.jsonl','volumes.png','best_1.png','worst_12.png'])
def test_X1_files_of_somebody_else_are_never_replaced(tmp_path, name):
    "A report replaces only files that covid3d.json lists; others under its names are refused, and the rest of a folder is left alone"
    out = tmp_path/'r'; out.mkdir(); others = ['best_practice.png','worst_case.png','best_.png','best_1.png.bak','my_scores.csv']
    for o in (*others,name): (out/o).write_text('mine')
    for overwrite in (False,True):
        with pytest.raises(CTError, match=f'{name}: is there already and was not written by covid3d'): write_report(table('near','good'), out, overwrite=overwrite)
    assert {o.name:o.read_text() for o in out.iterdir()}==dict.fromkeys((*others,name), 'mine')
    (out/name).unlink(); write_report(table('near','good'), out); assert all((out/o).read_text()=='mine' for o in others)
    with pytest.raises(CTError, match='exists already. Choose another --out, or add --overwrite'): write_report(table('near','good'), out, overwrite=False)

@pytest.mark.parametrize('there', [True,False])
def test_a_folder_that_is_a_mount_point(tmp_path, monkeypatch, there):
    "Nothing is moved over the border of a folder that exists, and nothing is made beside it"
    out,real,beside = tmp_path/'r',os.replace,[]
    if there: out.mkdir()
    def replace(a, b):
        if (out in Path(a).parents)!=(out in Path(b).parents): raise OSError(errno.EXDEV, 'Invalid cross-device link')
        if out in Path(b).parents: beside.extend(o.name for o in tmp_path.iterdir() if o!=out)
        return real(a, b)
    monkeypatch.setattr(os, 'replace', replace)
    assert write_report(table('near','good'), out).exists() and not beside and not [o for o in out.iterdir() if o.name.startswith('.')]

@pytest.mark.fault('X6')
@pytest.mark.promise('lost')
@pytest.mark.parametrize('fails_at', range(1,9))
def test_X6_a_write_that_fails_leaves_no_page_beside_other_figures(tmp_path, monkeypatch, fails_at):
    "Whatever file of a report cannot be written, a page that stands there is complete in itself, scores are written first, and no draft stays"
    old,new = table('near','good'),table('near','pred')
    out = tmp_path/'r'; write_report(old, out); (out/'mine.txt').write_text('mine')
    n,real,failed = [0],os.replace,None
    def replace(a, b):
        n[0] += 1
        if n[0]==fails_at: raise OSError(28, 'No space left on device')
        return real(a, b)
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', replace)
        try: write_report(new, out)
        except CTError as e: failed = e; assert 'No space left' in str(e)
    text = (out/'index.html').read_text() if failed is None else ''
    assert (failed is None)==(fails_at in (4,5) or fails_at>6) and (out/'index.html').exists()==(failed is None)   # three tables, two pictures, the page
    assert ('is left out' in text)==(fails_at in (4,5)) and (out/'mine.txt').read_text()=='mine' and not list(tmp_path.rglob('.*'))
    if fails_at>3: assert case_counts(read_scores(out))['misses']==1   # the figures are there, page or not
    write_report(new, out); assert case_counts(read_scores(out))['misses']==1 and (out/'index.html').exists()

@pytest.mark.fault('X6')
@pytest.mark.promise('lost')
@pytest.mark.parametrize('limit,title,page', [(16_500,'x',True),(16_500,'x'*9000,False)], ids=['no pictures','no page'])
def test_X6_a_full_disk_costs_pictures_and_never_scores(tmp_path, capsys, limit, title, page):
    "On a disk that is full once the scores are written, scores.csv, summary.csv and report.json are whole and what is missing is told"
    df,was = cohort([f'case_{i}' for i in range(10)]),resource.getrlimit(resource.RLIMIT_FSIZE); refused = ''
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit,was[1]))
    try: write_report(df, tmp_path/'r', title)
    except CTError as e: refused = str(e)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert 'scores.png could not be drawn (cannot be written' in capsys.readouterr().err and ('index.html' in refused and 'cannot be written' in refused)!=page
    pd.testing.assert_frame_equal(read_scores(tmp_path/'r'), df); assert (tmp_path/'r'/'summary.csv').exists() and json.loads((tmp_path/'r'/'report.json').read_text())['counts']==case_counts(df)
    assert (tmp_path/'r'/'index.html').exists()==page and not list(tmp_path.rglob('.*'))

@pytest.mark.promise('lost')
@pytest.mark.parametrize('fails', ['plot_volumes','plot_scores','plot_snapshot','save_figure'])
@pytest.mark.parametrize('error', [OSError(28,'No space left on device'), ValueError('$x^'), RuntimeError('Font'), MemoryError()], ids=lambda e: type(e).__name__)
def test_a_picture_that_fails_costs_no_score(tmp_path, monkeypatch, capsys, fails, error):
    "Whatever a drawing raises, the report has every number, its page, and the name of the picture that is missing"
    monkeypatch.setattr(score_page, fails, lambda *a, **k: (_ for _ in ()).throw(error))
    keep = Extremes(1); keep(dict(case='a', dice=.5), grid, *masks('near'))
    df = table('near','good'); at = write_report(df, tmp_path/'r', extremes=keep); text = at.read_text()
    assert read_scores(tmp_path/'r').equals(df) and f'could not be drawn ({type(error).__name__}), and is left out' in text and 'left out' in capsys.readouterr().err
    assert len(list((tmp_path/'r').glob('*.png')))==text.count('<img')=={'save_figure':0}.get(fails, 2)

@pytest.mark.promise('lost')
@pytest.mark.parametrize('rc', [{'text.usetex':True}, {'font.family':'No Such Font'}, {'axes.formatter.use_mathtext':True, 'text.parse_math':True}, {'figure.autolayout':True}], ids=lambda o: next(iter(o)))
def test_names_and_settings_of_the_user_spoil_no_picture(tmp_path, rc):
    "Dollar signs, line ends and control characters in names, LaTeX or a missing font in a matplotlibrc: all pictures are there"
    import matplotlib.pyplot as plt
    keep = Extremes(1); keep(dict(case='$\\foo$_\x1b[31m\n', dice=.5), grid, *masks('near'))
    df = table('near','good', names=['$\\foo$','$^_'])
    with plt.rc_context(rc): at = write_report(df, tmp_path/'r', '$\\frac$', keep, {'$\\foo$':df, '$a\nb$\x1b[31m':df}, name='$_{$')
    assert {o.name for o in (tmp_path/'r').glob('*.png')}=={'scores.png','volumes.png','worst_1.png'} and 'left out' not in at.read_text()

# Runs that resume

def counting(cases):
    class Counts(Band):
        seen = 0
        def forward(self, x):
            Counts.seen += 1
            if getattr(self, 'last', None)==Counts.seen: raise KeyboardInterrupt
            return super().forward(x)
    return Counts()

@pytest.mark.fault('X5')
@pytest.mark.promise('lost')
def test_X5_an_interrupted_evaluation_resumes_to_equal_scores(cases, tmp_path):
    "Stopped at any case, evaluate keeps every finished score and ends with the files of a run without a break"
    model,whole = counting(cases),tmp_path/'whole'; df,_,kept = evaluate_cases(Segmenter(model, spec), cases, whole); windows = type(model).seen; assert kept==0 and windows>=len(cases)
    out = tmp_path/'run'
    for n in range(1, 50):
        type(model).seen,model.last = 0,2*windows//len(cases)
        try: again,at,kept = evaluate_cases(Segmenter(model, spec), cases, out); break
        except KeyboardInterrupt: assert len((out/'scores.jsonl').read_bytes().splitlines())==n+1 and not (out/'scores.csv').exists()
    assert n==len(cases) and kept==n-1
    pd.testing.assert_frame_equal(again, df); names = {o.name for o in whole.iterdir()}; assert {o.name for o in out.iterdir()}==names
    for k in names-{'covid3d.json','scores.jsonl'}: assert (out/k).read_bytes()==(whole/k).read_bytes(), k

@pytest.mark.fault('X5')
@pytest.mark.promise('lost')
def test_X5_what_counts_is_content(cases, tmp_path):
    "A case is kept if its scan, reference, weights and settings are the same, whatever files and names they have; otherwise it is scored anew or refused"
    import nibabel as nib
    out,model = tmp_path/'run',counting(cases); evaluate_cases(Segmenter(model, spec), cases[:3], out); n = type(model).seen
    def again(part, *args, m=None, overlap=.5, **kwargs): type(model).seen = 0; return (*evaluate_cases(Segmenter(m or model, spec, overlap), part, out, *args, **kwargs), type(model).seen)
    img = nib.load(cases[0].ct); nib.save(nib.Nifti1Image(np.asarray(img.dataobj), img.affine), tmp_path/'copy.nii'); copy = Case(cases[0].name, tmp_path/'copy.nii', cases[0].masks)
    assert again([copy,*cases[1:3]])[2:]==(3,0)                                     # another file, the same voxels
    m = nib.load(cases[1].masks['lesion']); d = np.asarray(m.dataobj).copy(); d[tuple(np.argwhere(d>0)[0])] = 0; nib.save(nib.Nifti1Image(d, m.affine), tmp_path/'m.nii.gz')
    df,_,kept,seen = again([cases[0],Case(cases[1].name, cases[1].ct, dict(lesion=tmp_path/'m.nii.gz')),cases[2]]); assert kept==2 and 0<seen<n   # a corrected mask
    assert df.tp[1]+df.fn[1]==(d>0).sum()
    assert again(cases[:4])[2:][0]==3                                              # one more case
    files = {o.name:o.read_bytes() for o in out.iterdir()}
    for word,call in (('weights .* then, .* now',lambda: again(cases, m=Band(.3))), ('overlap 0.5 then, 0.25 now',lambda: again(cases, overlap=.25)), ('tolerance 3.0 then, 1.0 now',lambda: again(cases, 1.)), ('that this table lacks',lambda: again(cases[:2]))):
        with pytest.raises(CTError, match=word): call()
    assert {o.name:o.read_bytes() for o in out.iterdir()}==files
    assert again(cases[:2], overlap=.25, overwrite=True)[2]==0 and len(read_scores(out))==2

@pytest.mark.fault('X5','K5')
def test_X5_a_torn_journal_keeps_its_whole_lines(cases, tmp_path):
    "Whatever stands behind the last whole line is cut off, and the next row goes there"
    out,model = tmp_path/'run',counting(cases); df,*_ = evaluate_cases(Segmenter(model, spec), cases[:1], out, pictures=0); f = out/'scores.jsonl'; whole = f.read_bytes()
    for tail in (b'{"key": "', b'\0'*500, b'{}\n{}\n', b'['*10**5+b'\n', b'{"key": 5, "row": 5}\n', json.dumps(dict(key='0'*32, row={})).encode()+b'\n'):
        f.write_bytes(whole+tail); settings,rows,good = read_journal(f); assert len(rows)==1 and good==len(whole)
    two,_,kept = evaluate_cases(Segmenter(model, spec), cases[:2], out, pictures=0); assert kept==1 and f.read_bytes().startswith(whole+b'{"key"') and len(read_journal(f)[1])==2
    pd.testing.assert_frame_equal(two[:1], df)

@pytest.mark.fault('X6')
@pytest.mark.promise('lost')
def test_X6_a_journal_that_cannot_be_written_stops_at_once(cases, tmp_path):
    "A full disk while cases are scored ends the run in one line that says how to resume; finished rows stay"
    out,was = tmp_path/'run',resource.getrlimit(resource.RLIMIT_FSIZE)
    evaluate_cases(Segmenter(Band(), spec), cases[:1], out, pictures=0); whole = (out/'scores.jsonl').read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole)+100,was[1]))
    try:
        with pytest.raises(CTError, match=r'scores.jsonl: cannot be written .*Make room, and give the same command again: it resumes.'): evaluate_cases(Segmenter(Band(), spec), cases, out, pictures=0)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert (out/'scores.jsonl').read_bytes()==whole and not list(out.glob('.*')) and len(read_scores(out))==1
    assert evaluate_cases(Segmenter(Band(), spec), cases[:2], out, pictures=0)[2]==1

@pytest.mark.fault('X12')
@pytest.mark.promise('lost')
def test_X12_two_evaluations_in_one_folder(cases, tmp_path):
    "The second of two at once is told, and changes nothing"
    code = f"from covid3d.files import locked\nimport sys\nwith locked({str(tmp_path/'run')!r}): print('mine', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable,'-c',code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout.readline()=='mine\n'
        for f in (lambda: evaluate_cases(Segmenter(Band(), spec), cases[:1], tmp_path/'run'), lambda: write_report(table('near'), tmp_path/'run')):
            with pytest.raises(CTError, match='another process is writing there'): f()
        p.stdin.close()
    assert not (tmp_path/'run'/'scores.csv').exists()

@pytest.mark.promise('executed')
def test_a_journal_from_a_stranger_leads_nowhere(cases, tmp_path):
    "A link, a pipe or JSON of other types in the place of the journal is refused, and nothing outside the folder is written"
    out,victim = tmp_path/'run',tmp_path/'victim'; evaluate_cases(Segmenter(Band(), spec), cases[:1], out); f = out/'scores.jsonl'; whole = f.read_bytes(); victim.write_bytes(whole)
    f.unlink(); f.symlink_to(victim)
    with pytest.raises(CTError, match='is a link'): evaluate_cases(Segmenter(Band(), spec), cases[:2], out)
    f.unlink(); os.mkfifo(f)
    with pytest.raises(CTError, match='is not a regular file'): evaluate_cases(Segmenter(Band(), spec), cases[:2], out)
    f.unlink()
    for text in (b'', b'[]', b'{"settings": 5}\n', b'['*10**5, b'\xff\n'):
        f.write_bytes(text)
        with pytest.raises(CTError, match='scores.jsonl: is not a journal of scores'): evaluate_cases(Segmenter(Band(), spec), cases[:2], out)
    assert victim.read_bytes()==whole

@pytest.mark.promise('silent')
def test_the_class_that_was_scored_is_named(cases, tmp_path):
    "Weights of two classes: the page and report.json say which one was scored and which was not; the other can be chosen"
    two = CTSpec(spacing=spec.spacing, patch=spec.patch, classes=('lesion','lung'))
    class Two(Band):
        def forward(self, x): return super().forward(x).repeat(1,2,1,1,1)
    df,at,_ = evaluate_cases(Segmenter(Two(), two), cases[:1], tmp_path/'a'); other,at2,_ = evaluate_cases(Segmenter(Two(), two), cases[:1], tmp_path/'b', klass='lung')
    assert 'about the class lesion. The weights also find lung, which was not scored here.' in at.read_text() and 'about the class lung. The weights also find lesion' in json.loads((tmp_path/'b'/'report.json').read_text())['notes'][0]
    assert df.reference_ml[0]!=other.reference_ml[0]
    with pytest.raises(CTError, match='class lesion then, lung now'): evaluate_cases(Segmenter(Two(), two), cases[:1], tmp_path/'a', klass='lung')

@pytest.mark.fault('X14')
def test_X14_bad_cases_are_named_and_only_they_are_tried_again(cases, tmp_path):
    "CTError, MemoryError, OSError, RuntimeError of a case: each is a line, the others are scored"
    errors = [CTError('a','is bad','Look'), MemoryError('no'), OSError(5,'I/O'), RuntimeError('bad')]
    class Fails(Band):
        def forward(self, x):
            if errors: raise errors.pop(0)
            return super().forward(x)
    several = [*cases, Case('fifth', cases[0].ct, cases[0].masks)]
    df,_,_ = evaluate_cases(Segmenter(Fails(), spec), several, tmp_path/'r', pictures=0); assert (df.error!='').tolist()==[True]*4+[False] and df.case.tolist()==[c.name for c in several]
    df,_,kept = evaluate_cases(Segmenter(Fails(), spec), several, tmp_path/'r', pictures=0); assert (df.error=='').all() and kept==2   # the fifth is the first scan again


def test_small_cohorts_make_a_page(tmp_path):
    for i,df in enumerate((table('good'),table('both'),table('pred'),table('mask'),table('mask','pred','both'),score_table([dict(case='a',error='gone')]))):
        assert Page(write_report(df, tmp_path/str(i)).read_text()).tags

def test_extremes_are_the_extremes():
    rng = np.random.default_rng(0)
    for n,m in product((1,3,5),(0,1,4,6,30)):
        d,keep = rng.permutation(100)[:m]/100,Extremes(n)
        for x in d: keep(dict(case=str(x), dice=x), grid, *masks('near'))
        worst,best = [o.dice for o in keep.worst],[o.dice for o in keep.best]
        assert worst==sorted(d)[:len(worst)] and best==sorted(d)[::-1][:len(best)] and not set(worst)&set(best) and len(worst)+len(best)==min(m,2*n) and len(worst)-len(best) in (0,1)

def test_the_picture_shows_the_dispute():
    p,m = (o.copy() for o in masks('good')); p[6,:4,:4] = True; m[4,3:5,3:8] = False
    s = snapshot(dict(case='a',dice=.5), grid, p, m)
    assert s.index==6 and (s.prediction==p[6]).all() and (s.reference==m[6]).all()

# The command

@pytest.fixture(scope='module')
def study(cases, tmp_path_factory):
    "Weights of two classes that were trained on the first scan, and a table of all"
    from covid3d.weights import NetSpec, Seen, save_model
    from covid3d.volume import scan_digest
    root = tmp_path_factory.mktemp('study'); two = CTSpec(spacing=spec.spacing, patch=spec.patch, classes=('lesion','lung')); net = NetSpec(width=4)
    torch.manual_seed(0); save_model(net.build(two.classes), root/'m.safetensors', two, net, seen=Seen(cases=1, scans=(scan_digest(cases[0].open_ct()),)))
    rows = [dict(case=c.name, ct=str(c.ct), **{k:str(p) for k,p in c.masks.items()}, split='test') for c in cases[:2]]
    pd.DataFrame(rows).to_csv(root/'cases.csv', index=False)
    return root

def covid3d_evaluate(study, out, *more):
    from covid3d.cli import main
    return main(['evaluate', str(study/'cases.csv'), '--weights', str(study/'m.safetensors'), '--out', str(out), '--device', 'cpu', *map(str, more)])

@pytest.mark.promise('silent')
def test_what_a_reader_must_know_is_said(study, tmp_path, capfd):
    "A case that the weights were trained on, and the class that was not scored, are told on the terminal and on the page"
    assert covid3d_evaluate(study, tmp_path/'r')==0; out,err = capfd.readouterr(); page = (tmp_path/'r'/'index.html').read_text()
    assert 'warning: 1 of 2 cases trained these weights or chose them (phantom_000)' in err and '1 of 2 cases trained these weights' in page
    for text in (out,page): assert 'about the class lesion. The weights also find lung, which was not scored here.' in text
    assert covid3d_evaluate(study, tmp_path/'lung', '--score-class', 'lung', '--compare', tmp_path/'r')==0; out,_ = capfd.readouterr()
    assert 'about the class lung' in out and 'scored against another reference' in out
    assert covid3d_evaluate(study, tmp_path/'x', '--score-class', 'liver')==2 and "do not find 'liver'. Give lesion or lung" in capfd.readouterr().err and not (tmp_path/'x').exists()

@pytest.mark.promise('lost')
def test_the_command_resumes_and_replaces_no_input(study, tmp_path, capfd):
    "The same command keeps what is finished; other settings need --overwrite; a case table, a mask or a compared folder in OUT is never replaced"
    import shutil
    out = tmp_path/'r'; assert covid3d_evaluate(study, out)==0; before = (out/'scores.csv').read_bytes(); capfd.readouterr()
    assert covid3d_evaluate(study, out)==0 and '2 of 2 cases were scored before and are kept' in capfd.readouterr().out and (out/'scores.csv').read_bytes()==before
    assert covid3d_evaluate(study, out, '--overlap', '.25')==2 and 'is of another evaluation: overlap 0.5 then, 0.25 now. Choose another --out, or add --overwrite' in capfd.readouterr().err and (out/'scores.csv').read_bytes()==before
    assert covid3d_evaluate(study, out, '--compare', out, '--overwrite')==2 and 'is read here, and the report would replace it' in capfd.readouterr().err
    mine = tmp_path/'mine'; shutil.copytree(study, mine); (mine/'thesis.txt').touch(); held = {o.name:o.read_bytes() for o in mine.iterdir()}
    assert covid3d_evaluate(mine, mine, '--overwrite')==0 and {o.name:o.read_bytes() for o in mine.iterdir()}.items()>=held.items(); capfd.readouterr()
    shutil.copy(study/'cases.csv', mine/'summary.csv')
    from covid3d.cli import main
    assert main(['evaluate', str(mine/'summary.csv'), '--weights', str(mine/'m.safetensors'), '--out', str(mine), '--overwrite', '--device', 'cpu'])==2 and 'summary.csv: is read here' in capfd.readouterr().err
    assert (mine/'summary.csv').read_bytes()==(study/'cases.csv').read_bytes()

@pytest.mark.promise('lost')
def test_a_compared_folder_with_an_odd_name(study, tmp_path, capfd):
    "Folders named as formulas or with escape codes cost no picture, and the codes do not reach the terminal"
    for name in ('$\\foo$','a\x1b[31m\nb'): assert covid3d_evaluate(study, tmp_path/name, '--pictures', 0)==0
    assert covid3d_evaluate(study, tmp_path/'r', '--compare', f'{tmp_path}/$\\foo$', '--compare', f'{tmp_path}/a\x1b[31m\nb')==0; out,err = capfd.readouterr()
    line = [o for o in out.splitlines() if o.startswith('against a')]; assert '\x1b' not in ''.join(line) and 'left out' not in err and 'by Holm for 6 comparisons' in out and (tmp_path/'r'/'scores.png').exists()

# By hand

def refused(message, f, *args, error=CTError, **kwargs):
    with pytest.raises(error) as e: f(*args, **kwargs)
    assert message in str(e.value)

ref = np.zeros((10,12,12), bool); ref[3:7,4:8,4:8] = True
small = Volume(np.zeros(ref.shape, np.int16), canonical_affine((5,1,1)))
def five_pairs():
    "Right, shifted by a column, both empty, a false alarm, a miss"
    none = ref&False; pairs = dict(right=(ref,ref), shifted=(np.roll(ref,1,2),ref), silent=(none,none), alarm=(ref,none), miss=(none,ref))
    return score_table([score_masks(Case(k,None), small, *o) for k,o in pairs.items()])

def test_a_row_by_hand():
    "Three of four columns agree; 64 voxels of 5 mm³ are 0.32 ml"
    row = score_masks(Case('by_hand',None), small, np.roll(ref,1,2), ref)
    want = dict(dice=.75, precision=.75, recall=.75, reference_ml=.32, predicted_ml=.32, volume_error_ml=0, hd95=1, lesion_f1=1)
    assert {k:row[k] for k in want}==pytest.approx(want, abs=1e-12) and {*row}=={*row_names} and (row['case'],row['patient'],row['tolerance_mm'])==('by_hand','by_hand',3)
    t = score_table([row, dict(case='x', error='lost')])
    assert [*t]==[*row_names] and [*t.patient]==['by_hand','x'] and t.tp[0]==row['tp'] and t.tp.isna()[1] and np.isnan(t.dice[1]) and t.error[0]==''
    assert case_counts(t)==dict(cases=2, failed=1, patients=1, scored=1, both_empty=0, false_alarms=0, misses=0)
    assert case_counts(five_pairs())==dict(cases=5, failed=0, patients=4, scored=4, both_empty=1, false_alarms=1, misses=1)

def test_the_error_of_a_ratio_by_hand():
    x = np.array([.2,.5,.6,.9])
    assert _ratio_se(x, np.ones(4))==pytest.approx(x.std(ddof=1)/2, abs=1e-12) and _ratio(*per_patient(['a','a','b','c'], x, np.ones(4)))==pytest.approx(x.mean(), abs=1e-12)
    assert [o.tolist() for o in per_patient(['a','b','a'], [1,2,3], [1,1,1])]==[[4,2],[2,1]]

def test_intervals_of_few_patients():
    x,one = made_up(np.random.default_rng(3), 7),np.ones(7)
    assert np.isnan(ratio_interval([.5], [1], least=0)).all() and ratio_interval([.5]*3, np.ones(3), least=2)==(.5,.5) and ratio_interval([.1,.9], np.ones(2), (0,1), least=2)==(0,1)
    assert np.isnan(ratio_interval(x[:5], one[:5])).all() and np.isfinite(ratio_interval(x[:6], one[:6])).all()
    width = lambda n: [np.diff(ratio_interval(made_up(np.random.default_rng(100*n+i), n), np.ones(n), (0,1), 499, 2))[0] for i in range(40)]
    w = {n:np.array(width(n)) for n in (2,4,6,8)}
    assert (w[2]>.999).all() and np.median(w[2])>np.median(w[4])>np.median(w[6])>np.median(w[8])
    assert mean_interval(x, range(7), (0,1))==ratio_interval(x, one, (0,1)) and np.isnan(mean_interval(x, [0,0,1,1,2,2,3], (0,1))).all()
    assert mean_interval(np.repeat(x,3), np.repeat(range(7),3), (0,1))==pytest.approx(mean_interval(x, range(7), (0,1)), abs=1e-9)  # three copies of a scan are no new evidence

def test_quantiles_beside_infinities():
    x = made_up(np.random.default_rng(0), 20)
    assert _quantiles([1,2,math.inf], (0,.5,.75,1)).tolist()==[1,2,math.inf,math.inf] and _quantiles([1,3,5,math.inf], (.5,)).tolist()==[4]
    assert _quantiles(x, (.1,.5,.83))==pytest.approx(np.quantile(x, (.1,.5,.83)), abs=1e-12) and np.isnan(_quantiles([])).all()

def test_a_summary_by_hand():
    "64 and 48 voxels agree, 16+16 differ in the shifted case, 64 are false, 64 missed"
    odd = five_pairs(); t = summarise(odd); v = odd.loc[odd['empty'].isin(['','mask','pred']), [*score_names]].astype(float)
    np.testing.assert_allclose(t.loc[[*score_names],['n','mean','median']].values.astype(float), np.stack([v.count(), v.mean(), v.median()], 1))
    assert t.loc['pooled_dice','mean']==pytest.approx(2*(64+48)/(2*(64+48)+16+16+64+64), abs=1e-12) and np.isnan(t.loc['pooled_dice',['sd','median','q1','q3']]).all()
    assert t.loc['hd95','mean']==math.inf and np.isnan(t.loc['hd95',['sd','low','high']]).all() and t.loc['hd95','infinite']==2
    assert [*t]==['n','patients','infinite','mean','sd','median','q1','q3','low','high'] and summarise(odd.iloc[2:3]).n.sum()==0 and {*score_labels}=={*t.index}
    assert headline(odd).endswith('4 cases of 4 patients · 1 with both masks empty, not scored · 1 false alarm · 1 missed') and 'no interval: fewer than 6 patients' in headline(odd)
    assert '2 false alarms' in headline(pd.concat([odd, odd.assign(case=odd['case']+'b')])) and '1 case of 1 patient' in headline(odd.iloc[:1])

def test_numbers_as_text():
    assert [fmt(*o) for o in ((.12345,'dice'),(1234.56,'hd95'),(math.inf,'hd95'),(math.nan,'dice'),(-.5,'volume_error_ml'),(-math.inf,'volume_error_ml'))]==['0.123','1,234.6','∞','—','−0.5','−∞']
    assert [fmt(-math.inf, sign=True),fmt(math.inf, sign=True),span(math.nan, math.nan)]==['−∞','+∞','—'] and [many(1,'case'),many(2,'case'),many(0,'miss','misses')]==['1 case','2 cases','0 misses']
    assert label_of('nsd', 3.)=='Surface Dice at 3 mm' and label_of('hd95')=='HD95 (mm)'

def test_paired_tests_by_hand():
    "Differences 1, 2, 3 and −1: of the 16 patterns of signs two give 5 and one gives 7, as many −5 and −7"
    d = np.array([1.,2,3,-1]); t = paired_tests(d, np.ones(4))
    assert t['p']==pytest.approx(6/16, abs=1e-12) and t['p_least']==1/8 and paired_tests(np.zeros(3), np.ones(3))['p']==1 and t['p_wilcoxon']==pytest.approx(stats.wilcoxon(d).pvalue, abs=1e-12)
    assert [paired_tests(o, np.ones(len(o)))['p_least'] for o in (np.r_[d,0,0], np.zeros(3), np.ones(1), np.ones(20))]==[1/8,1,1,2/5000]
    assert paired_tests(np.r_[d,0,0], np.ones(6))['p']==pytest.approx(6/16, abs=1e-12) and paired_tests(np.ones(20), np.ones(20))['p']==pytest.approx(2/5000, abs=1e-12)
    for ps,want in (([.01,.04,.03,.005],[.03,.06,.06,.02]), ([],[]), ([.2],[.2]), ([.6,.7],[1,1]), ([.5**6]*5,[5/64]*5)): assert holm(ps)==pytest.approx(want, abs=1e-12)

def test_what_cannot_be_compared():
    odd,(a,b) = five_pairs(),pair([.1,.2,-.05,.1,.3,.02,0])
    refused('only in the first: phantom_000; only in the second: x. Score both models on the same cases', check_same_cases, ['a','phantom_000'], ['a','x']); refused("case 'a' appears twice", check_same_cases, ['a','a'], ['a'])
    refused("case 'miss' was scored against another reference", _pairs, odd, odd.assign(fn=odd.fn.where(odd.case!='miss', 3)), 'dice'); refused('two tolerances', _pairs, odd, odd.assign(tolerance_mm=1.), 'nsd')
    flat,c = compare(odd, odd),compare(a, b)
    assert (flat['difference'],flat['p'],flat['patients'])==(0,1,4) and np.isnan(flat['low']) and compare(b, a)['difference']==-c['difference'] and compare(b, a)['p']==pytest.approx(c['p'], abs=1e-12)
    assert c['difference']==pytest.approx((a.dice-b.dice).mean(), abs=1e-12)
    a,b = (o.assign(nsd=o.dice, lesion_f1=o.dice**2, tolerance_mm=3.) for o in (a,b))
    found = compare_all(a, {'B':b, 'somebody':b[1:]})
    assert found['somebody']==difference_line(found['somebody'])=='compare: the tables hold different cases, only in the first: c0. Score both models on the same cases.'
    assert {k:found['B'][0][k] for k in c}==c and found['B'][0]['family']==3 and [o['p_holm'] for o in found['B']]==pytest.approx(holm([o['p'] for o in found['B']]), abs=1e-12)
    one_mm = compare_all(a, dict(other=b.assign(tolerance_mm=1.)))['other']  # the surface Dice alone has no comparison
    assert [o.get('reason','') for o in one_mm]==['','compare: the surface Dice has two tolerances. Score both models with one --tolerance.',''] and [one_mm[i]['p'] for i in (0,2)]==[found['B'][i]['p'] for i in (0,2)]

def test_agreement_by_hand():
    "2, −1, 5: mean 2, sd 3"
    assert [agreement(pd.DataFrame(dict(volume_error_ml=[2.,-1,5,np.nan])))[k] for k in ('n','bias','low','high')]==pytest.approx([3,2,2-1.96*3,2+1.96*3], abs=1e-12)
    t = five_pairs(); assert agreement(t)['bias']==pytest.approx(summarise(t).loc['volume_error_ml','mean'])

def test_tables_come_back_from_their_files(tmp_path):
    a = five_pairs(); odd_names = a.assign(case=['=1+1','a,b;','"q"','x\ny','z'], error=['']*4+['@cmd'])
    write_atomic(tmp_path/'scores.csv', scores_csv(odd_names)); back = read_scores(tmp_path/'scores.csv')
    assert [*back.case]==[c.replace('\n',' ') for c in odd_names.case] and [*back.error]==[*odd_names.error] and [*back.dtypes]==[*a.dtypes] and back.tn.equals(a.tn)
    pd.testing.assert_frame_equal(back[[*row_names[2:-1]]], odd_names[[*row_names[2:-1]]], check_exact=True)
    assert summarise(back.assign(error='')).loc['hd95','infinite']==2
    (tmp_path/'no.csv').write_text('case,x\na,1\n'); refused('the column dice, tp, fp, fn, empty, error is missing. Give the scores.csv', read_scores, tmp_path/'no.csv'); refused('no such file', read_scores, tmp_path/'nowhere.csv')
    for k in 'ab': (tmp_path/k/'run').mkdir(parents=True); write_atomic(tmp_path/k/'run'/'scores.csv', scores_csv(a))
    assert [*read_others([tmp_path/'a'/'run', tmp_path/'b'/'run'/'scores.csv'])]==['a/run','b/run']; refused('the same name', read_others, [tmp_path/'a'/'run']*2)

# The journal and what goes into it, by hand

@pytest.fixture(scope='module')
def eight(tmp_path_factory):
    "Eight phantoms: one is damaged, one has no mask, the first two are of one patient"
    from covid3d.phantom import write_phantoms
    cases = read_cases(write_phantoms(tmp_path_factory.mktemp('eight'), n=8, seed=23, shape=(32,96,96), spacing=(9,3.7,3.7)))
    cases[5].ct.write_bytes(b'\x1f\x8b broken'); cases[6] = Case('no_mask', cases[4].ct)
    return [Case(c.name, c.ct, c.masks, patient='twice') for c in cases[:2]]+cases[2:]

def band(cls=Band, spec=spec, low=-720, *args): return Segmenter(cls((low+1000)/1400, (-380+1000)/1400), spec, *args)

def test_a_cohort_by_hand(eight, tmp_path):
    df,row = score_cases(band(), eight),score_case(band(), eight[0])
    seg = band()(eight[0]); pred,ref = seg.masks['lesion'].ravel(),eight[0].open_mask('lesion', seg.ct).data.ravel()
    for k,f in dict(dice=skm.f1_score, precision=skm.precision_score, recall=skm.recall_score).items(): assert row[k]==pytest.approx(f(ref,pred), abs=1e-12)
    assert row['reference_ml']==pytest.approx(ref.sum()*9*3.7*3.7/1000, abs=1e-3) and df.dice[0]==row['dice'] and df.patient.nunique()==7
    assert 'gzip stream is damaged' in df.error[5] and 'no mask of class' in df.error[6] and not df.error.str.contains(str(eight[0].ct.parent)).any() and [*df.dice.isna()]==[False]*5+[True]*2+[False]
    assert case_counts(df)==dict(cases=8, failed=2, patients=5, scored=6, both_empty=0, false_alarms=0, misses=0)

def test_errors_that_nobody_thought_of(eight, tmp_path):
    class Exhausted(Band):
        def forward(self, x): raise MemoryError
    class Names(Band):
        def forward(self, x): raise RuntimeError(f'{tmp_path}/DOE^JOHN/x.so\nfailed')
    assert 'more memory than there is' in score_cases(band(Exhausted), eight[:1]).error[0]
    text = score_cases(band(Names), eight[:1]).error[0]; assert not any(o in text for o in ('DOE', str(tmp_path), '\n')) and text.startswith('phantom_000: RuntimeError')

def test_what_a_row_is_known_by():
    ct,m = small,ref; key = _pair_digest(ct, m)
    assert key==_pair_digest(ct.new(ct.data.copy()), m.astype('uint8')) and len({key, _pair_digest(ct, np.roll(m,1,0)), _pair_digest(Volume(ct.data, canonical_affine((5,1,2))), m), _pair_digest(ct.new(ct.data+1), m)})==4
    assert band().digest==band().digest!=band(low=-719).digest and band().digest!=band(spec=CTSpec(spacing=(9,3.7,3.8), patch=(16,96,96))).digest

def test_rows_and_pictures_come_back(eight):
    "To the last digit, NaN and infinity included; what is none is refused"
    there = lambda o: json.loads(json.dumps(o))
    miss,both,row = score_masks(Case('miss',None), small, ref&False, ref),score_masks(Case('both',None), small, ref&False, ref&False),score_case(band(), eight[0])
    pd.testing.assert_frame_equal(score_table([_row_from(there(to_json(o))) for o in (row,miss,both)]), score_table([row,miss,both]), check_exact=True)
    for bad in ([], {}, dict(miss, dice='1'), dict(miss, dice=True), dict(miss, tp=10**400), dict(miss, case=5), dict(miss, extra=1)): refused('', _row_from, bad, error=ValueError)
    keep = Extremes(3); df = score_cases(band(), eight, each=keep); w = keep.worst[1]; back = _unpack(there(_pack(w)))
    assert (back.case,back.dice,back.index,back.aspect)==(w.case,w.dice,w.index,w.aspect)
    for k in ('img','reference','prediction'): assert (getattr(back,k)==getattr(w,k)).all() and getattr(back,k).shape==w.img.shape
    bomb = base64.b64encode(zlib.compress(bytes(10**7))).decode()
    for bad in (dict(pixels=bomb), dict(shape=[2**20,2**20]), dict(shape=[0,5]), dict(shape=[3,5]), dict(shape=5), dict(aspect=1e9), dict(aspect='x'), dict(pixels='?'), dict(dice=None), dict(pixels=5)):
        refused('', _unpack, _pack(w)|bad, error=ValueError)
    refused('', _unpack, {}, error=ValueError)
    first = keep.worst[0]; seg = band()(next(c for c in eight if c.name==first.case))
    assert (first.case,keep.best[0].case)==(df.case[df.dice.idxmin()],df.case[df.dice.idxmax()])
    assert (first.prediction==(seg.masks['lesion'][first.index]>0)).all() and (first.img==seg.ct.data[first.index]).all() and (first.reference!=first.prediction).any()

def test_a_journal_resumes_or_refuses(eight, tmp_path):
    "A torn line, other weights, a case that is gone, a file that is none, a full disk"
    class Counted(Band):
        seen = 0
        def forward(self, x): Counted.seen += 1; return super().forward(x)
    f = tmp_path/'scores.jsonl'
    def scored(part, overwrite=False, **settings):
        keep,Counted.seen = Extremes(1),0
        j = Journal(f, dict(weights='w')|settings, keep); j.begin([c.name for c in part], overwrite)
        return score_cases(band(Counted), part, each=keep, journal=j),Counted.seen,keep
    three,first,_ = scored(eight[:3])
    with open(f, 'ab') as o: o.write(b'{"key": "torn li')
    (five,second,_),(again,third,few) = scored(eight[:5]),scored(eight[:5])
    assert (first,second,third)==(3,2,0)
    for a,b in ((five,again), (five[:3],three), (five,score_cases(band(), eight[:5]))): pd.testing.assert_frame_equal(a, b)
    assert [o.case for o in few.kept]==[five.case[five.dice.idxmin()],five.case[five.dice.idxmax()]]
    refused('of another evaluation: weights w then, v now; overlap absent then, 0.25 now. Choose', scored, eight[:5], weights='v', overlap=.25)
    refused('holds scores of 1 case that this table lacks, phantom_004 first', scored, eight[:4])
    assert scored(eight[:4], True)[1]>0; f.write_text('{"a": 5}\n'); refused('is not a journal of scores', scored, eight[:4])
    scored(eight[:1], True); limit,before = resource.getrlimit(resource.RLIMIT_FSIZE),f.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (f.stat().st_size+99, limit[1]))
    try: refused('Make room, and give the same command again', scored, eight[:3], error=_Unkept)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert f.read_bytes()==before

def test_an_evaluation_that_was_interrupted(eight, tmp_path):
    class Killed(Band):
        seen,last = 0,3
        def forward(self, x):
            Killed.seen += 1
            if Killed.seen>self.last: raise KeyboardInterrupt
            return super().forward(x)
    with pytest.raises(KeyboardInterrupt): evaluate_cases(band(Killed), eight, tmp_path/'run', pictures=1)
    Killed.seen,Killed.last = 0,10**6; df,_,kept = evaluate_cases(band(Killed), eight, tmp_path/'run', pictures=1)
    assert 0<kept<8; pd.testing.assert_frame_equal(df, score_cases(band(), eight))
    refused('another evaluation: overlap 0.5 then, 0.25 now. Choose another --out, or add --overwrite', evaluate_cases, band(Killed, spec, -720, .25), eight, tmp_path/'run')
    before,Killed.seen = (tmp_path/'run'/'scores.csv').read_bytes(),0
    _,_,kept = evaluate_cases(band(Killed), eight, tmp_path/'run', title='Another title', pictures=1)
    assert (kept,(tmp_path/'run'/'scores.csv').read_bytes(),Killed.seen)==(6,before,0)  # the two that failed are tried again

def test_notes_on_the_weights():
    assert class_note(spec, 'lesion')=='' and 'lung, which was not scored' in class_note(CTSpec(classes=('lesion','lung')), 'lesion')
    assert seen_note(dict(a='1'), {'2'})=='' and 'do not say' in seen_note(dict(a='1'), None) and 'and 2 more' in seen_note({f'c{i}':'1' for i in range(7)}, {'1'})
    assert seen_note(dict(case_1='a', case_2='b', case_3='c'), {'b','x'}).startswith('1 of 3 cases trained these weights or chose them (case_2)')
