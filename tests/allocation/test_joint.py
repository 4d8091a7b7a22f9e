"""Sites that runtimes join: one setting for all of them, in plans and in what is left."""

from octavo.allocation.budget import Budget
from octavo.allocation.leftover import upgrades
from octavo.allocation.profiles import Curve, Point, Profile
from octavo.allocation.solver import allocate


def curve(site, fine, coarse):
    """A site with two settings: 100 bytes at one loss, 50 at another."""
    points = [Point("rtn", {"bits": 8}, 100, fine), Point("rtn", {"bits": 4}, 50, coarse)]
    return Curve(site, "linear", (8, 8), points)


def profile(**options):
    curves = [curve("q", 0.0, 9.0), curve("k", 0.0, 1.0), curve("o", 0.0, 4.0)]
    return Profile("net", "", 600, 192, 0, curves, options=options)


def bits(plan):
    return {site: point.setting["bits"] for site, point in plan.items()}


def test_joined_sites_get_one_setting():
    alone, joined = (allocate(p, Budget(250, "")) for p in (profile(), profile(joined={"q": "qk", "k": "qk"})))
    assert bits(alone.points) == {"q": 8, "k": 4, "o": 8}
    assert bits(joined.points) == {"q": 8, "k": 8, "o": 4}


def test_what_is_left_raises_them_together_or_not_at_all():
    found = profile(joined={"q": "qk", "k": "qk"})
    coarse = {one.site: one.points[1] for one in found.curves}
    assert bits(dict(upgrades(found, coarse, 100))) == {"q": 8, "k": 8}
    assert bits(dict(upgrades(found, coarse, 50))) == {"o": 8}


def test_where_the_user_chose_for_one_of_them_each_is_for_itself():
    found = profile(joined={"q": "qk", "k": "qk"})
    found.curves[0].points = [Point("keep", {"dtype": "float16"}, 128, 0.0)]
    assert bits({"k": allocate(found, Budget(228, "")).points["k"]}) == {"k": 4}
