"""A fault campaign: a small model is trained under faults, and must end as if there had been none.

    campaign    which faults there are, in which order they are tried, the table
    trial       one try: a run that has faults, is started again, and is compared
    bench       the small run that is not touched, with which all others are compared
    forked      ranks as forks of a process that has imported torch: a start costs no import
    disk        what a rank writes, told operation by operation: to be counted, killed, failed
    replay      a disk after a power cut, from what ranks wrote and synced
    killing, failing, damaging, stopping, resharding, launching     the faults

Nothing in the trainer knows of it: faults are made from outside, or by what a forked rank replaces
in itself before it calls `train.main`.
"""
