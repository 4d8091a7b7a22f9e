import sys; sys.argv=["x","0.03","1","12"]
src=open(".t3.py").read().split("torch.manual_seed(0); m=")[0]
exec(src)
from octavo.recipes.pruning.yolo import *
m=Locator(12); m.load_state_dict(torch.load("/tmp/wt/teach/.cache/m.pt")); m.eval()
te=[*zip(*(p.split(100) for p in test))]; im=train[0][:256]
print(average_precision(m,te))
for c in (False,True):
    s=cut(m,by_scale,im,carried=c); print("cut",c,average_precision(s,te))
from octavo.training import recalibrate
print("recal",average_precision(recalibrate(cut(m,by_scale,im,carried=False),im.split(64)),te))
