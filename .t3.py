import sys,time, torch
from octavo.recipes.frame import Lab
from octavo.recipes.frame.study import Study
from octavo.recipes.frame.data import *
from octavo.recipes.frame.nets import shuffled
from octavo.recipes.testbeds.scenes import *
from octavo.training import fit
from octavo.training.regimens.slimming import *
study=Study("x",system="",source="",metric="",higher=True,data="",claims={})
lab=Lab(study)
t=time.process_time()
import pathlib
f=pathlib.Path("/tmp/wt/teach/.cache/scenes.pt")
if f.exists(): parts=torch.load(f)
else:
    p=scenes(fashion(lab),cifar10(lab),2400,400); parts=(p.train,p.test); torch.save(parts,f)
train,test=parts
print("data",time.process_time()-t,flush=True)
lr,n,w=float(sys.argv[1]),int(sys.argv[2]),int(sys.argv[3])
torch.manual_seed(0); m=Locator(w)
print(sum(p.numel() for p in m.parameters()))
t=time.process_time()
import itertools
def b(e): return itertools.islice(itertools.chain.from_iterable(shuffled(*train,size=32,seed=0)(k) for k in range(99)),n)
reg=Slimming(float(sys.argv[4])) if len(sys.argv)>4 else None
print(fit(m,b,heat,epochs=1,optimizer=without_decay(lr),regimen=reg),"s/step",(time.process_time()-t)/n,flush=True)
te=[*zip(*(p.split(100) for p in test))]
t=time.process_time(); print("AP",average_precision(m,te),time.process_time()-t)
torch.save(m.state_dict(),"/tmp/wt/teach/.cache/m.pt")
from octavo.recipes.pruning.yolo import *
print("near",near_zero(m), [ (n,[round(float(x),2) for x in s.detach().abs().sort().values[::6]]) for n,s in scales(m).items()])
im=train[0][:256]
for c in (False,True):
    s=cut(m,by_scale,im,carried=c)
    print("cut",c,sum(p.numel() for p in s.parameters()),average_precision(s,te))
s=cut(m,by_filters,im,carried=True); print("filters",sum(p.numel() for p in s.parameters()),average_precision(s,te)); s=cut(m,by_scale,im,carried=True); print([p.shape for p in s.parameters() if p.ndim>1])
