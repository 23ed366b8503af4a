"""What can go wrong, tried: kills, damaged and hostile files, full disks (``tests/faults.sh``)."""
