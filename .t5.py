import sys,time, torch, itertools, copy, pathlib
from octavo.recipes.frame import Lab
from octavo.recipes.frame.study import Study
from octavo.recipes.testbeds.students import *
from octavo.training.teaching import *
study=Study("x",system="",source="",metric="",higher=True,data="",claims={})
lab=Lab(study)
C=pathlib.Path("/tmp/wt/teach/.cache")
f=C/"reviews.pt"
if f.exists(): parts=torch.load(f,weights_only=False)
else: parts=reviews(lab); torch.save(parts,f)
stage,n=sys.argv[1],int(sys.argv[2])
def ep(batches,n): return lambda e: itertools.islice(itertools.chain.from_iterable(dealt(batches,0)(k) for k in range(99)),n)
t=time.process_time()
if stage=="teach":
    terms={"ours":[Relations(12)],"at":[Relations(12,related=(ATTENTION,))],"hidden":[HiddenStates(evenly([f"encoder.layer.{k}" for k in range(6)],[f"encoder.layer.{k}" for k in range(3)]))]}[sys.argv[3]]
    texts=[b for b,_ in spaced(parts.train,64)]
    s=encoder(lab,3,0); lesson=Lesson(pretrained(lab),terms,remember=torch.float16)
    with lesson.maps(s,texts[0]):
        l=[]
        def logged(m,b):
            v=lesson(m,b); l.append(float(v)); return v
        fit(s,ep(texts,n),logged,epochs=1,lr=float(sys.argv[4]))
        print(sys.argv[3],[round(sum(l[i:i+n//8])/(n//8),4) for i in range(0,n,n//8)])
    torch.save(s.state_dict(),C/f"{sys.argv[3]}.pt")
else:
    s=encoder(lab,3,0)
    if stage!="scratch": s.load_state_dict(torch.load(C/f"{stage}.pt"))
    torch.manual_seed(0); c=Classifier(s)
    fit(c,ep(parts.train,n),cross_entropy,epochs=1,lr=float(sys.argv[3]))
    print(stage,n,sys.argv[3],"dev",right(c,parts.development),"test",right(c,parts.test),flush=True)
print(time.process_time()-t)
