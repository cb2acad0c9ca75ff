"""Where control groups are mounted, as the kernel says it."""

from __future__ import annotations

from serving_service.cgroups import mounted


def test_mounts_that_are_not_as_usual_are_passed_over() -> None:
    mountinfo = "\n".join(
        [
            "22 1 0:21 / /proc rw,nosuid - proc proc rw",
            "23 1 0:99 / /mnt/share rw - fuse.share  rw",  # whoever mounted it gave it no source
            "24 1 0:98 / /mnt/none rw - fuse.none",
            "25 1 - broken",
            "",
            "29 23 0:26 / /sys/fs/cgroup ro shared:4 - cgroup2 cgroup rw,nsdelegate",
            "30 23 0:27 / /sys/fs/cgroup/pids rw shared:5 master:1 - cgroup  rw,pids",
            "31 23 0:27 /below /elsewhere rw - cgroup cgroup rw,memory",
        ]
    )
    assert dict(mounted(mountinfo)) == {"": "/sys/fs/cgroup", "pids": "/sys/fs/cgroup/pids"}
