"""The table of mutate.py: for each file, a mistake in words, the exact text, and what it becomes.

A mistake is one that a person makes and a reader overlooks: an edge, a sign, a reduction, a unit, a
check left out. One that changes nothing that can be observed does not belong here.
"""

NAMED = (
    "the schedule is stepped before the optimizer",
    "gradients are not clipped",
    "the finite check comes after the update",
    "a non-finite gradient with a finite loss is let through",
    "debug.seed does not reach the weights",
    "a parameter's name is not part of its seed",
    "all weights are drawn with one deviation",
    "norm weights start at 0.9",
    "label 0 is not counted as valid",
    "document masking is not applied in validation",
    "a negative weight decay is accepted",
    "ranks that see different corpora train on",
    "each rank stops by its own signal",
    "memory is that of rank 0 alone",
    "data time is that of rank 0 alone",
)
"""Those that passed all tests of the suite once; they are run first."""

MUTANTS = {
    "torchtrain/tools/preflight/allocator.py": [
        (
            "a free block is lost when the one after it is taken",
            "self._add(start + size, end)",
            "pass",
        ),
        (
            "free neighbors stay apart",
            "first = self._starts.get(start, start)",
            "first = start",
        ),
        (
            "a segment leaves its free end where it is",
            "start = self._starts.get(self.size, self.size)",
            "start = self.size",
        ),
        ("small tensors are placed among the large ones", "if size <= SMALL:", "if size == 0:"),
    ],
    "torchtrain/tools/preflight/replay.py": [
        (
            "the replay keeps the weights of a layer gathered",
            "            heap.free(gathered.pop())\n",
            "            gathered.pop()\n",
        ),
        (
            "the replay ends before most microbatches are under way",
            "return actions[: 2 * begun]",
            "return actions[:2]",
        ),
        (
            "the replay gives the inputs' half of a backward no room",
            "            self.heap.run_half_backward(layer)\n",
            "            pass\n",
        ),
    ],
    "torchtrain/tools/preflight/walk.py": [
        (
            "preflight forgets the gradients of earlier microbatches",
            "            ledger.hold(gradients=(root + stage.weights).parameters)\n",
            "            ledger.hold(gradients=root.parameters)\n",
        ),
        (
            "preflight forgets the gathered weights of the next block",
            "coming = following.first_gather if following is not None and gathers else 0",
            "coming = 0",
        ),
        (
            "preflight forgets what the allocator keeps for other streams",
            "cached=self.most.total() - self.worst.total",
            "cached=0",
        ),
        (
            "preflight forgets the gradients that are being reduced",
            "communication=reducing,",
            "communication=0,",
        ),
        (
            "preflight takes the output to be freed after its forward",
            "return resharding.output if is_output else resharding.blocks",
            "return resharding.blocks",
        ),
        (
            "preflight has one microbatch alive in a pipeline",
            "            ledger.hold(**stage.kept)\n            continue\n",
            "            continue\n",
        ),
        (
            "preflight has half a backward free what the other half needs",
            "        if kind == schedules.BACKWARD_INPUT:\n            continue",
            "        if kind == schedules.BACKWARD_WEIGHT:\n            continue",
        ),
        (
            "preflight frees what is sent with its microbatch",
            "        ledger.hold(communication=stage.output_sent)\n",
            "",
        ),
        (
            "preflight forgets a pipeline's whole gradients",
            "ledger.hold(unsharded_gradients=stage.weights.accumulated)",
            "ledger.hold(unsharded_gradients=0)",
        ),
    ],
    "torchtrain/tools/preflight/specimen.py": [
        (
            "preflight counts the whole tensors that DTensor works out shapes on",
            "        with _disable_current_modes():\n            return work_out(propagator, schema)",
            "        return work_out(propagator, schema)",
        ),
    ],
    "torchtrain/tools/preflight/states.py": [
        (
            "preflight counts offloaded parameters on the device",
            "parameters=0 if training.enable_cpu_offload else shard * stored,",
            "parameters=shard * stored,",
        ),
        (
            "preflight takes what is gathered in float8 for whole numbers",
            "gathered = FLOAT8 if name in in_float8 else computed",
            "gathered = computed",
        ),
        (
            "preflight forgets what uneven shards are filled up with",
            "rows = shape[0] if is_even else math.ceil(shape[0] / ranks) * ranks",
            "rows = shape[0]",
        ),
    ],
    "torchtrain/tools/preflight/optimizer_states.py": [
        (
            "preflight counts one of a weight's optimizer states",
            "name: sum(each.nbytes for each",
            "name: max(each.nbytes for each",
        ),
    ],
    "torchtrain/tools/preflight/memory.py": [
        (
            "preflight counts the optimizer states of a rank's first stage alone",
            "        for number in numbers:\n            for layer in self.plan.stages[number]:",
            "        for number in numbers[:1]:\n            for layer in self.plan.stages[number]:",
        ),
        (
            "preflight gives each pipeline rank the microbatches of another",
            "actions = list_actions(plan.pipeline, plan.degrees.pp)[rank]",
            "actions = list_actions(plan.pipeline, plan.degrees.pp)[rank - 1]",
        ),
    ],
    "torchtrain/tools/interfaces.py": [
        (
            "gloo is left the loopback that a machine's own name is",
            "if own and not is_loopback(own):",
            "if own:",
        ),
        (
            "node 0 looks for no way to the others where its own name is its loopback",
            "for host in (nodes.address, *ways, ELSEWHERE):",
            "for host in (nodes.address, ELSEWHERE):",
        ),
        (
            "where no way to the others is known, the default route is not tried",
            "for host in (nodes.address, *ways, ELSEWHERE):",
            "for host in (nodes.address, *ways):",
        ),
    ],
    "torchtrain/tools/standby.py": [
        (
            "a rank finds torchtrain in the working directory first",
            "[*python, __file__, str(read_end), *rank_command],",
            '[*python, "-m", "torchtrain.tools.standby", str(read_end), *rank_command],',
        ),
    ],
    "torchtrain/tools/meeting.py": [
        (
            "nodes do not tell each other how they reach node 0",
            "yield [word.removeprefix(READY) for word in words]",
            "yield [word.removeprefix(READY) for word in words[:1]]",
        ),
        (
            "node 0 does not wait until its name has an address",
            "    _wait_for_address(nodes)\n",
            "",
        ),
    ],
    "torchtrain/tools/sweep/__main__.py": [
        (
            "a run that failed stays so",
            "ending is not None and ending.is_final",
            "ending is not None",
        ),
        (
            "a run that is under way elsewhere is begun once more",
            "elif not is_free:",
            "elif ending is not None and not is_free:",
        ),
        (
            "a sweep that is stopped goes on with the next run",
            "return 128 + runner.stopped_by",
            "pass",
        ),
        (
            "runs that are to go on count as done",
            "return ELSEWHERE if without <= elsewhere else TRY_AGAIN",
            "return 0",
        ),
        (
            "a job waits in a loop for a run that is under way elsewhere",
            "return ELSEWHERE if without <= elsewhere else TRY_AGAIN",
            "return TRY_AGAIN",
        ),
    ],
    "torchtrain/tools/sweep/kept.py": [
        (
            "a changed option of a run that has begun is not noticed",
            "if before.get(key) != now.get(key)",
            "if key not in before",
        ),
        (
            "an option that an older run's file lacks counts as changed",
            "before = defaults | flat(",
            "before = flat(",
        ),
    ],
    "torchtrain/tools/sweep/naming.py": [
        (
            "two runs have one folder",
            "if is_whole and times[name.casefold()] == 1",
            "if times",
        ),
    ],
    "torchtrain/tools/sweep/plan.py": [
        (
            "all runs write one folder of checkpoints",
            "        if len(by_run) > 1:\n",
            "        if len(by_run) > len(runs):\n",
        ),
        (
            "a fault is told of the first run that has it",
            "reports.setdefault(text, []).append(name)",
            "reports.setdefault(text, [name])",
        ),
    ],
    "torchtrain/tools/sweep/running.py": [
        (
            "a run that is stopped counts as failed",
            "if self.stopped_by and status != 0:",
            "if self.stopped_by and status == 0:",
        ),
        ("a log of an earlier start tells how a run has ended", "        file.seek(begin)\n", ""),
        (
            "a run that has not trained is done",
            'Ending("done" if has_logged else "failed", status, seconds)',
            'Ending("done", status, seconds)',
        ),
        (
            "a spike is listed as not finite",
            "if numbers is None or all(math.isfinite(float(number)) for number in numbers.groups()):",
            "if numbers is None:",
        ),
        (
            "a table keeps a run from starting",
            "fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)",
            "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        ),
        (
            "a signal reaches the sweep alone",
            "            self._process.send_signal(number)\n",
            "            pass\n",
        ),
    ],
    "torchtrain/tools/sweep/table.py": [
        (
            "a run that is not done can be the best",
            'if row.state == "done" and row.loss is not None',
            "if row.loss is not None",
        ),
        (
            "validation decides where not all have one",
            "if done and len(by_validation) == len(done):",
            "if done and by_validation:",
        ),
    ],
    "torchtrain/tools/launch.py": [
        (
            "the older name of the allocator's settings is passed over",
            "environment.keys().isdisjoint(ALLOCATOR_VARIABLES)",
            "ALLOCATOR_VARIABLES[0] not in environment",
        ),
    ],
    "torchtrain/tools/memory_check.py": [
        (
            "preflight finds torchtrain in the working directory first",
            'program = [sys.executable, str(package / "tools" / "preflight" / "__main__.py")]',
            'program = [sys.executable, "-m", "torchtrain.tools.preflight"]',
        ),
        (
            "the smallest card decides, which the worst rank may not have",
            "return max(map(int, sizes)) * 2**20",
            "return min(map(int, sizes)) * 2**20",
        ),
        (
            "a finished run is refused by the card that it does not need",
            "        if not is_finished(config):\n            raise\n",
            "        raise\n",
        ),
        (
            "logits are left out where ranks share them",
            'if "loss" in compiled:',
            'if "loss" in compiled or config.parallelism.tensor_parallel_degree > 1:',
        ),
        (
            "gradients are not among what surely lives",
            "(2 * stored + means * mean)",
            "(stored + means * mean)",
        ),
        (
            "states in host memory are looked for on the card",
            "if config.training.enable_cpu_offload or not count",
            "if not count",
        ),
        (
            "a compiled block is taken to keep what another does",
            'doubtful += (1 - KEPT_COMPILED) * rank["activations"]',
            'doubtful += 0 * rank["activations"]',
        ),
        (
            "the first pipeline rank decides, not the one with the most",
            "if max(count_sure(config, rank) for rank in ranks) > memory:",
            "if count_sure(config, ranks[0]) > memory:",
        ),
    ],
    "torchtrain/bf16_states.py": [
        (
            "means are rounded towards 0",
            "rounded = (bits & half).add_(",
            "rounded = (bits & 0).add_(",
        ),
        (
            "an element's place in this rank's part decides, not in the whole",
            "torch.arange(start, start + length,",
            "torch.arange(0, length,",
        ),
    ],
    "torchtrain/parallelisms/float8.py": [
        (
            "compiled programs by rows leave out roundings",
            'section.recipe_name != "rowwise"',
            'section.recipe_name == "rowwise"',
        ),
        (
            "a share of columns is taken for whole",
            'tensor_ranks if role == "rows" else 1',
            "1",
        ),
    ],
    "torchtrain/parallelisms/float8_gather.py": [
        (
            "a scale is that of a rank's shard",
            "            dist.all_reduce(largest, dist.ReduceOp.MAX, mesh.get_group(dim))\n",
            "            pass\n",
        ),
        (
            "a scale outlives its weight",
            "            shard.scale = None\n",
            "            pass\n",
        ),
    ],
    "torchtrain/kernel_checks.py": [
        (
            "heads of 16 are refused under masks",
            "shape.width_per_head < LEAST_MASKED_WIDTH",
            "shape.width_per_head <= LEAST_MASKED_WIDTH",
        ),
        (
            "a ring in bf16 takes heads wider than flash attention does",
            "is_allowed = is_allowed and shape.width_per_head <= LARGEST_FLASH_WIDTH",
            "is_allowed = is_allowed",
        ),
        (
            "bf16 that is emulated counts as a card's own",
            "module.is_bf16_supported(including_emulation=False)",
            "module.is_bf16_supported()",
        ),
        (
            "a compiled loss needs bf16, which PyTorch leaves uncompiled",
            'if compiled.enable and "model" in compiled.components and compiled',
            "if compiled.enable and compiled",
        ),
    ],
    "torchtrain/devices.py": [
        (
            "all ranks of torchrun take the one GPU that they see",
            "if visible == 1 and not dist.is_torchelastic_launched():",
            "if visible == 1:",
        ),
        (
            "a LOCAL_RANK one beyond the last GPU is taken",
            "if local_rank >= visible:",
            "if local_rank > visible:",
        ),
        (
            "GPUs hidden on purpose are spoken of",
            'NO_DEVICES = ("", "-1", "NoDevFiles")',
            'NO_DEVICES = ("-1", "NoDevFiles")',
        ),
    ],
    "train.py": [
        (
            "the norm is read on its own, which waits once more",
            'metrics.add("grad_norm", grad_norm, reduce="max")',
            'metrics.add("grad_norm", grad_norm.item(), reduce="max")',
        ),
        (
            "the peak of memory is that of the set-up",
            "    reset_peak_memory(trainer.device)",
            "    trainer.device",
        ),
        (
            "each rank reports the own time of all",
            'metrics.add("own_time_s", stopwatch.own_time_s, reduce="max")',
            'metrics.add("own_time_s", stopwatch.elapsed(), reduce="max")',
        ),
        (
            "memory is that of the best rank",
            'metrics.add("memory_gib", peak_memory_gib(trainer.device), reduce="max")',
            'metrics.add("memory_gib", peak_memory_gib(trainer.device), reduce="min")',
        ),
        (
            "data time is the ranks' mean",
            'metrics.add("data_time_s", stopwatch.data_time_s, reduce="max")',
            'metrics.add("data_time_s", stopwatch.data_time_s, reduce="mean")',
        ),
        (
            "the gradient norm is this rank's own",
            '        grad_norm=values.pop("grad_norm"),\n',
            '        grad_norm=(values.pop("grad_norm"), grad_norm.item())[1],\n',
        ),
        (
            "the loss is divided by all ranks",
            'values.pop("loss") / trainer.plan.degrees.ranks_per_stage',
            'values.pop("loss") / dist.get_world_size()',
        ),
        (
            "each rank stops by its own signal",
            'stopped_by = int(values.pop("stop_reason"))',
            'values.pop("stop_reason")\n    stopped_by = stop.find_reason()',
        ),
        (
            "memory is that of rank 0 alone",
            'metrics.add("memory_gib", peak_memory_gib(trainer.device), reduce="max")',
            'metrics.add("memory_gib", peak_memory_gib(trainer.device) * (dist.get_rank() == 0), reduce="max")',
        ),
        (
            "data time is that of rank 0 alone",
            'metrics.add("data_time_s", stopwatch.data_time_s, reduce="max")',
            'metrics.add("data_time_s", stopwatch.data_time_s * (dist.get_rank() == 0), reduce="max")',
        ),
        (
            "data time is added up over ranks",
            'metrics.add("data_time_s", stopwatch.data_time_s, reduce="max")',
            'metrics.add("data_time_s", stopwatch.data_time_s, reduce="sum")',
        ),
        (
            "the largest loss is that of the first rank",
            'metrics.add("max_loss", loss.largest, reduce="max")',
            'metrics.add("max_loss", loss.largest, reduce="min")',
        ),
        (
            "the loss counts each rank that shares samples",
            'values.pop("loss") / trainer.plan.degrees.ranks_per_stage',
            'values.pop("loss")',
        ),
        (
            "the logged rate is the next step's",
            'lr=trainer.optimizer.param_groups[0]["lr"]',
            "lr=trainer.lr_scheduler.lr_lambdas[0](trainer.step + 1) * trainer.config.optimizer.lr",
        ),
        (
            "the logged tokens leave out the step",
            "tokens_seen=trainer.tokens_seen + trainer.tokens_per_step",
            "tokens_seen=trainer.tokens_seen",
        ),
        (
            "the schedule is stepped before the optimizer",
            "        trainer.optimizer.step()\n        trainer.lr_scheduler.step()\n",
            "        trainer.lr_scheduler.step()\n        trainer.optimizer.step()\n",
        ),
        (
            "gradients are not clipped",
            "trainer.weights.values(), trainer.config.training.max_norm,",
            "trainer.weights.values(), 1e30,",
        ),
        (
            "the finite check comes after the update",
            "            summary = trainer.guard.judge(summary, loss.own)\n            optimizer_step(trainer, skips=summary.skipped)\n",
            "            optimizer_step(trainer)\n            summary = trainer.guard.judge(summary, loss.own)\n",
        ),
        (
            "a corrupt state is saved before it is looked for",
            "            if trainer.replica_check.is_due(step):\n",
            "            if trainer.replica_check.is_due(step - 1):\n",
        ),
        (
            "a skipped step shifts the rates",
            "        set_step(trainer.lr_scheduler, trainer.step + 1)\n",
            "        pass\n",
        ),
        (
            "a skipped step moves the routers' biases",
            "    if trainer.expert_balance is not None and not skips:\n",
            "    if trainer.expert_balance is not None:\n",
        ),
        (
            "document masking is not applied in validation",
            "return model.sequence_losses(model.parts[0](tokens, batch.documents), labels)",
            "return model.sequence_losses(model.parts[0](tokens), labels)",
        ),
        (
            "document masking is not applied in a pipeline's validation",
            "model.pipeline.evaluate(tokens, labels, batch.documents)",
            "model.pipeline.evaluate(tokens, labels)",
        ),
        ("gradients stay for the next step", "    trainer.optimizer.zero_grad()\n", ""),
        (
            "each rank divides by its own valid labels",
            "    dist.all_reduce(valid)\n    valid //= trainer.plan.degrees.ranks_per_sample  # each of which has counted\n",
            "",
        ),
        (
            "each microbatch divides by its own valid labels",
            "(losses.sum() / divisor).backward()",
            "(losses.sum() / count_valid(labels).sum()).backward()",
        ),
        (
            "a batch without a valid label has no finite loss",
            "divisor = valid.clamp(min=1)",
            "divisor = valid",
        ),
        (
            "the largest loss is a sum",
            "(losses / valid_by_sequence.clamp(min=1)).max()",
            "losses.max()",
        ),
        (
            "the largest loss is the smallest",
            "valid_by_sequence.clamp(min=1)).max()",
            "valid_by_sequence.clamp(min=1)).min()",
        ),
        (
            "losses of sequence shards are not added",
            '        dist.all_reduce(losses, group=trainer.mesh.group("cp"))\n',
            "        pass\n",
        ),
        (
            "the tokens of a step are counted twice",
            "trainer.tokens_seen += trainer.tokens_per_step",
            "trainer.tokens_seen += 2 * trainer.tokens_per_step",
        ),
        (
            "time spent validating counts",
            "    with stopwatch.paused(), warming_up",
            "    with warming_up",
        ),
        (
            "a stop waits for a validation",
            "lambda: stopped_by or stop.find_reason()",
            "lambda: 0 if stopped_by else stop.find_reason()",
        ),
        (
            "a stop in a validation is forgotten",
            "validated, stopped_by = validate(",
            "validated, _ = validate(",
        ),
        ("a first step is waited for", "    stop.listen()\n", ""),
        (
            "a stopped run trains on",
            "            if stopped_by:\n                raise Stopped(stopped_by, step)\n",
            "",
        ),
        (
            "gathered weights stay after a validation",
            "    free_gathered(trainer.parts.values())\n    return results\n",
            "    return results\n",
        ),
        (
            "gathered weights stay after texts",
            "    free_gathered(trainer.parts.values())\n    if metrics is not None and not reason:\n",
            "    if metrics is not None and not reason:\n",
        ),
        (
            "a stop waits for texts",
            "if trainer.text_sampler.is_due(step) and not stopped_by:",
            "if trainer.text_sampler.is_due(step):",
        ),
        (
            "a crash ends with status 0",
            '        logger.error(f"rank {rank} failed:\\n{traceback.format_exc()}")\n        return 1\n',
            '        logger.error(f"rank {rank} failed:\\n{traceback.format_exc()}")\n        return 0\n',
        ),
        (
            "a user error ends with status 1",
            "        return end_for_good(1 if isinstance(fault, BadNumbers) else 2)\n",
            "        return end_for_good(1)\n",
        ),
        (
            "a resumed run throws its log away",
            "    if is_own:\n        on_rank_zero(",
            "    if False:\n        on_rank_zero(",
        ),
        (
            "waiting for data is not counted",
            "trainer.loader.read(step, stopwatch.waiting_for_data, stop.find_reason)",
            "trainer.loader.read(step, stop_reason=stop.find_reason)",
        ),
    ],
    "torchtrain/set_up.py": [
        (
            "a source that is not there is found after others were tokenized",
            "    on_rank_zero(lambda: check_sources(sources, config.data, tokenizer), patient_group())\n",
            "",
        ),
        (
            "no run tries the tokenizer on streams",
            "    on_rank_zero(dataset.try_tokenizer, patient_group())\n",
            "",
        ),
        (
            "each rank prints the compiler's warning of complex operators",
            "    silence_compiler()\n",
            "",
        ),
        (
            "a mesh's groups keep PyTorch's timeout until the second step",
            "    set_timeout(config.comm.init_timeout_seconds)",
            "    assert mesh",
        ),
        (
            "the patterns of a user's model are not checked",
            "together(lambda: check_names(config, plan))",
            "assert plan",
        ),
        (
            "debug.seed does not reach the weights of the run",
            "seed = config.debug.seed if draws",
            "seed = 0 if draws",
        ),
        (
            "debug.seed does not reach the data",
            "config.data, tokenizer, config.debug.seed, config.validation\n",
            "config.data, tokenizer, 0, config.validation\n",
        ),
        (
            "the loss is never compiled",
            'if compile_section.enable and "loss" in compile_section.components:',
            "if False:",
        ),
        (
            "biases are not saved",
            "return {**self.weights, **self.buffers}",
            "return dict(self.weights)",
        ),
        (
            "ranks may see different corpora",
            '    require_equal(fingerprints, "the corpus, as each rank reads it,")\n',
            "",
        ),
    ],
    "torchtrain/early_interrupt.py": [
        (
            "a rank that reads its corpus has all the time",
            "        signal.setitimer(signal.ITIMER_REAL, max(left, 0.001))",
            "        signal.setitimer(signal.ITIMER_REAL, 0)",
        ),
        (
            "a rank is blamed for the end of its time",
            "        time.sleep(2 * SKEW_S)\n",
            "        pass\n",
        ),
    ],
    "torchtrain/tools/membership.py": [
        (
            "as many nodes train as there are",
            "launchers = {rank: alive[rank].launcher for rank in waiting[:number]}",
            "launchers = {rank: alive[rank].launcher for rank in waiting}",
        ),
        (
            "a node that comes takes a restart",
            'is_restart = not is_first and self.change != "join"',
            "is_restart = not is_first",
        ),
        (
            "ranks save while a node is lost",
            'if lost or any(node.cause for node in ended) or (ended and self.change != "join"):',
            'if (lost or ended) and self.change != "join":',
        ),
        (
            "a node that is started again passes for the one before",
            "if rank not in alive or alive[rank].launcher != launcher",
            "if rank not in alive",
        ),
    ],
    "torchtrain/tools/elastic.py": [
        (
            "nodes that come and go are left the loopback",
            "            choose_interface(self.nodes, self._find_ways(), os.environ)\n",
            "",
        ),
        (
            "a node that ends the run is taken for lost",
            "        if self.is_closed():",
            "        if False:",
        ),
        (
            "a node with another config is let in",
            '        if self._store.get("config").decode() != self._config:',
            "        if False:",
        ),
    ],
    "torchtrain/tools/parity.py": [
        (
            "layouts are run although their reference has failed",
            'if case["reference"] not in lost}',
            'if case["name"] not in lost}',
        ),
    ],
    "torchtrain/tools/parity_plan.py": [
        (
            "a user's model gets the heads of the shrunk one",
            "(TASKS[task].shrunk if self.is_shrunk else {})",
            "TASKS[task].shrunk",
        ),
    ],
    "torchtrain/tools/rank_errors.py": [
        (
            "a half line of a rank is lost",
            "(line[-BLOCK:] + text)",
            "text",
        ),
        (
            "the last collective of a rank is blamed, which waited for the first",
            "self.timeouts.setdefault(int(rank), took)",
            "self.timeouts[int(rank)] = took",
        ),
        (
            "what an output that does not block has no room for is lost",
            "                select.select([], [self._output], [])\n",
            "                return\n",
        ),
        (
            "a container without terminals ends the launcher",
            "with suppress(OSError):  # as in a container",
            "with suppress():  # as in a container",
        ),
    ],
    "torchtrain/tools/restarts.py": [
        (
            "a timeout of NCCL is told by its signal alone",
            'if name == "SIGABRT" and self.timeout:',
            'if name == "SIGKILL" and self.timeout:',
        ),
        (
            "a second Ctrl-C waits for a rank that does not answer",
            "                    send(signal.SIGKILL, processes)\n",
            "",
        ),
        (
            "a job whose time is up is started again",
            "return self.status in [TRY_AGAIN, *(",
            "return self.status in [*(",
        ),
        (
            "ranks that were asked to stop have half a minute",
            "    deadline = math.inf\n",
            "    deadline = time.monotonic() + grace_s\n",
        ),
    ],
    "torchtrain/stopping.py": [
        (
            "a second Ctrl-C waits too",
            "        if number == signal.SIGINT == self.signal_number:\n            raise KeyboardInterrupt\n",
            "",
        ),
        (
            "SIGHUP is not a request to stop",
            "            signal.signal(signal.SIGHUP, self._note)",
            "            pass",
        ),
        (
            "SIGHUP is one under nohup too",
            "if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:",
            "if True:",
        ),
        (
            "only max_minutes counts",
            "left = min(left, float(given) - now)",
            "float(given)",
        ),
        (
            "no time is left for a save",
            "2 * (turn_s + self._save_s)",
            "2 * turn_s",
        ),
    ],
    "torchtrain/exporting.py": [
        (
            "a converter outlives its rank",
            "    environment[STARTED_BY] = str(os.getpid())",
            "    environment[STARTED_BY] = str(os.getppid())",
        ),
        (
            "an export is not made up for",
            "    if target.exists():\n        return\n",
            "    if target.exists() or True:\n        return\n",
        ),
        (
            "a run that saves nothing exports",
            "section.last_save_in_hf and not section.load_only",
            "section.last_save_in_hf",
        ),
        (
            "a failed conversion is passed over",
            "if done.returncode != 0:",
            "if done.returncode > 2:",
        ),
    ],
    "torchtrain/config/rules.py": [
        (
            "a last rate far above the law's is not said",
            "<= last_rate <= FITTED_LAST_RATE * 2:",
            "<= last_rate:",
        ),
        ("tokens are rounded down to steps", "-(-tokens // per_step)", "tokens // per_step"),
        ("idle experts count for tokens", "factor *= count.active", "factor *= count.total"),
        (
            "a large batch raises the rate",
            "min(1.0, tokens_per_step / best_batch)",
            "tokens_per_step / best_batch",
        ),
        ("the rate counts the vocabulary", "1.79 * count.inner**", "1.79 * count.total**"),
        ("no run is outside of the law's range", "    if limits:\n", "    if not limits:\n"),
    ],
    "torchtrain/resuming.py": [
        (
            "what is missing is found when the checkpoints have been read and moved",
            "    if not seems_finished:\n        check_needs(config, device)\n    folder",
            "    seems_finished = True\n    folder",
        ),
        (
            "the steps on resume forget the checkpoint's batch",
            '        batch = saved.data["global_batch_size"]\n',
            "        batch = 1\n",
        ),
        (
            "the steps on resume forget the checkpoint's vocabulary",
            '(saved.shape or {}).get("vocab_size", 0)',
            "0",
        ),
        (
            "a rate that the rule has changed is not told",
            'saved.max_lr or saved.config["optimizer"]["lr"]',
            'saved.config["optimizer"]["lr"]',
        ),
        (
            "the data position is left out and loaded all the same",
            '    if "dataloader" not in source.left_out:',
            "    if source.left_out is not None:",
        ),
        (
            "the steps are left out and counted all the same",
            '    if "train_state" not in source.left_out:',
            "    if source.left_out is not None:",
        ),
        (
            "a run that counts its steps anew loses its data position",
            "        sample = trainer.loader.samples_before(saved.step + 1)\n",
            "",
        ),
        (
            "a checkpoint may be complete without its lines",
            "        metrics.sync()  # no complete",
            "        pass  # no complete",
        ),
        (
            "a stop does not save",
            "save_progress(trainer, checkpointer, metrics, stopping=True)",
            "save_progress(trainer, checkpointer, metrics, stopping=False)",
        ),
        (
            "the tokens seen begin at 0 on resume",
            "    trainer.tokens_seen = saved.tokens_seen\n",
            "",
        ),
        ("the rate is not set on resume", "    set_step(trainer.lr_scheduler, trainer.step)\n", ""),
        (
            "weights alone bring the step along",
            "        checkpointer.load(source, trainer.model_state, None)\n        return",
            "        checkpointer.load(source, trainer.model_state, None)\n        trainer.step = saved.step\n        return",
        ),
        (
            "a changed learning rate is not told",
            "        changes.insert(0, ",
            "        changes[:0] and changes.insert(0, ",
        ),
    ],
    "torchtrain/run_facts.py": [
        (
            "the peak of the job is that of one device",
            "device_peak * facts.world_size",
            "device_peak",
        ),
    ],
    "torchtrain/loss.py": [
        ("label 0 is not counted as valid", "(labels != IGNORE_INDEX).sum", "(labels > 0).sum"),
        (
            "losses are computed in the compute precision",
            "logits.float(), labels",
            "logits, labels",
        ),
        (
            "the loss of a large vocabulary is computed whole",
            "    if length >= len(rows):\n",
            "    if length > 0:\n",
        ),
        (
            "ranks with uneven shards of the vocabulary have chunks of their own",
            "chunk * shards // logits.shape[-1])",
            "chunk // (logits.to_local() if shards > 1 else logits).shape[-1])",
        ),
        (
            "a chunk's gradient is that of its plain sum",
            "torch.autograd.grad(losses, leaf, chunk_gradient)",
            "torch.autograd.grad(losses.sum(), leaf)",
        ),
        ("a sequence's loss is a mean", ".sum(dim=1)\n\n\ndef", ".mean(dim=1)\n\n\ndef"),
    ],
    "torchtrain/lr_scheduling.py": [
        ("the rate lags by a step", "lr_factor(epoch + 1, schedule)", "lr_factor(epoch, schedule)"),
        (
            "the rate goes on falling past the last step",
            "    step = min(step, schedule.total_steps)\n",
            "",
        ),
        ("the sqrt decay is linear in p", "1 - math.sqrt(p)", "1 - p"),
        (
            "the cosine decays to the middle",
            "(1 + math.cos(math.pi * p)) / 2",
            "(1 + math.cos(math.pi * p / 2)) / 2",
        ),
        (
            "the lowest rate is added, not interpolated",
            "(1 - schedule.min_lr_factor) * falling",
            "falling",
        ),
        (
            "a resumed scheduler keeps the optimizer's rate",
            '        group["lr"] = rate\n',
            "        pass\n",
        ),
    ],
    "torchtrain/config/plans.py": [
        (
            "the shortest warm-up is 1 step",
            "max(2, int(section.warmup_ratio",
            "max(1, int(section.warmup_ratio",
        ),
        (
            "warmup_steps = 0 is taken for unset",
            "if warmup is None:",
            "if not warmup:",
        ),
        (
            "the warm-up may be longer than the run",
            "    warmup = min(warmup, total)\n",
            "",
        ),
        (
            "the decay is rounded down",
            "round(section.decay_ratio * total)",
            "int(section.decay_ratio * total)",
        ),
        (
            "the decay may overlap the warm-up",
            "decay = min(decay, round(section.decay_ratio * total))",
            "decay = round(section.decay_ratio * total)",
        ),
        (
            "the schedule spans training.steps whatever total_steps says",
            "section.total_steps or training_steps",
            "training_steps",
        ),
        (
            "validation has training's batch size",
            "section.local_batch_size or batch.microbatch_size",
            "batch.microbatch_size",
        ),
        (
            "validation has training's sequence length",
            "section.seq_len or config.training.seq_len",
            "config.training.seq_len",
        ),
        (
            "validation.steps counts sequences",
            "section.steps * batch.global_batch_size",
            "section.steps",
        ),
        (
            "a vocabulary smaller than the tokenizer's is accepted",
            "if shape.vocab_size < tokenizer_size:",
            "if shape.vocab_size < 1:",
        ),
        (
            "backwards stay split under recomputation",
            "and (compiled or recomputes)",
            "and compiled",
        ),
        (
            "backwards stay split under compilation",
            "and (compiled or recomputes)",
            "and recomputes",
        ),
        (
            "a pipeline's activations are whole sequences",
            "seq_len // degrees.cp // layout.count_sequence_shards(config.parallelism)",
            "seq_len // degrees.cp",
        ),
        (
            "the tokenizer under torchtitan's name is not found",
            "model.tokenizer_path or model.hf_assets_path or str",
            "model.tokenizer_path or str",
        ),
    ],
    "torchtrain/config/layout.py": [
        (
            "the smallest microbatch is taken",
            "microbatch_size = max(fitting)",
            "microbatch_size = min(fitting)",
        ),
        (
            "a microbatch may be larger than the local batch",
            "if size <= training.local_batch_size]",
            "if size <= 2 * training.local_batch_size]",
        ),
        (
            "the checkpoint's global batch is ignored",
            "saved_global_batch_size or training.local_batch_size * ranks",
            "training.local_batch_size * ranks",
        ),
        (
            "degrees below the world size leave ranks idle",
            "elif product != world_size:",
            "elif product > world_size:",
        ),
        (
            "the sequence is never sharded over tensor ranks",
            "return parallelism.tensor_parallel_degree\n",
            "return 1\n",
        ),
        (
            "layers per stage are rounded down",
            "math.ceil((blocks + first + last) / layers_per_stage)",
            "(blocks + first + last) // layers_per_stage",
        ),
        (
            "the nearest divisor above is left out",
            "divisors[above - 1 : above + 1]",
            "divisors[above - 1 : above]",
        ),
        ("tensor ranks read different samples", "return self.cp * self.tp\n", "return self.cp\n"),
    ],
    "torchtrain/config/model_checks.py": [
        (
            "an odd head width is accepted",
            "if shape.width_per_head % 2 and",
            "if shape.width_per_head % 1 and",
        ),
        (
            "more experts are chosen than there are",
            "    if k > experts:\n",
            "    if k > 2 * experts:\n",
        ),
        (
            "a router that cannot learn is accepted",
            "if k == 1 < experts and shape.router_renormalize:",
            "if k < 1:",
        ),
        ("equal RoPE factors are accepted", "high <= low", "high < low"),
        (
            "tensor parallelism may cut the feed-forward anyhow",
            'must_divide("parallelism.tensor_parallel_degree", tp, shared)',
            'must_divide("parallelism.tensor_parallel_degree", tp, heads)',
        ),
        (
            "ulysses may cut heads anyhow",
            "            heads,\n",
            "            {},\n",
        ),
        (
            "experts may be shared unevenly",
            '"parallelism.expert_parallel_degree", parallelism.expert_parallel_degree, experts',
            '"parallelism.expert_parallel_degree", 1, experts',
        ),
    ],
    "torchtrain/config/checks.py": [
        (
            "other exchanges may go on within a pair",
            "if layout.overlaps_exchanges(parallelism) and degree > 1:",
            "if layout.overlaps_exchanges(parallelism) and degree > 2:",
        ),
        (
            "the sequence need not be cut in two per rank",
            "        factor *= 2\n",
            "        factor *= 1\n",
        ),
        (
            "validation's sequence length is not checked",
            'lengths["validation.seq_len"] = config.validation.seq_len',
            "pass",
        ),
        (
            "document masks pass through the ring",
            "config.training.document_masking and cp > 1 and is_ring",
            "config.training.document_masking and cp > 2 and is_ring",
        ),
        (
            "a split backward may reshard always",
            'if SCHEDULES[schedule].splits_backward and reshard == "always":',
            "if False:",
        ),
        (
            "an output folder may leave the run's folder",
            'inside = folder.parts and ".." not in folder.parts',
            "inside = True",
        ),
        (
            "a profile may be longer than its period",
            "window > profiling.profile_freq",
            "window > profiling.profile_freq + 1",
        ),
        (
            "a memory budget is accepted without the compiler",
            'config.activation_checkpoint.mode == "memory_budget"',
            "False",
        ),
        (
            "best-fit packing of a stream is accepted",
            'data.streaming and data.packing == "best_fit"',
            "False",
        ),
        (
            "documents may be held out of a stream",
            '"what data.streaming = true reads once" if config.data.streaming else ""',
            '""',
        ),
        (
            "both names of the tokenizer at once",
            "if model.tokenizer_path is not None and model.hf_assets_path is not None:",
            "if False:",
        ),
    ],
    "torchtrain/config/schema.py": [
        (
            "a negative weight decay is accepted",
            "weight_decay: NotNegative = 0.1",
            "weight_decay: float = 0.1",
        ),
        (
            "weight decay is off by default",
            "weight_decay: NotNegative = 0.1",
            "weight_decay: NotNegative = 0.0",
        ),
        (
            "a learning rate of 0 is accepted",
            'lr: Positive | Literal["auto"] = 8e-4',
            'lr: NotNegative | Literal["auto"] = 8e-4',
        ),
        (
            "a beta of 1 is accepted",
            "Beta = Annotated[float, Field(ge=0, lt=1)]",
            "Beta = Annotated[float, Field(ge=0, le=1)]",
        ),
        (
            "a whole share may be held out",
            "held_out_share: Annotated[float, Field(gt=0, lt=1)]",
            "held_out_share: Annotated[float, Field(gt=0, le=1)]",
        ),
        ("infinities are accepted", "allow_inf_nan=False", "allow_inf_nan=True"),
        ("numbers in quotes are accepted", "strict=True, ", ""),
        ("beta2 is PyTorch's default", "beta2: Beta = 0.95", "beta2: Beta = 0.999"),
        (
            "a clipping norm of 0 is accepted",
            "max_norm: Positive = 1.0",
            "max_norm: NotNegative = 1.0",
        ),
        (
            "negative seeds are accepted",
            "seed: Annotated[int, Field(ge=0, le=2**63 - 1)]",
            "seed: Annotated[int, Field(le=2**63 - 1)]",
        ),
        ("a batch of 0 is accepted", "Count | Literal[-1]", "CountOrZero | Literal[-1]"),
    ],
    "torchtrain/config/reading.py": [
        (
            "tokens that are unset do not give back the steps",
            'merged.get("training", {}).get("tokens") is not None:',
            '"tokens" in merged.get("training", {}):',
        ),
        (
            "the file wins over the command line",
            "sources.insert(0, read_toml(config_file))",
            "sources.append(read_toml(config_file))",
        ),
        (
            "an option may be given twice",
            "        if name in source.values:\n",
            "        if False:\n",
        ),
        (
            "false on the command line is a text",
            '{"true": True, "false": False}.get(text, text)',
            '{"true": True}.get(text, text)',
        ),
        (
            "config_file in a file is taken",
            'if source.values.pop("job.config_file", None) is not None:',
            'if source.values.pop("job.config_files", None) is not None:',
        ),
        (
            "a clash is told although one of its values is wrong",
            "if not report.unreliable.intersection(clash.keys):",
            "if True:",
        ),
        ("a byte-order mark is a fault", 'decode("utf-8-sig")', 'decode("utf-8")'),
    ],
    "torchtrain/config/sources.py": [
        ("a source of a mixture may be named twice", "if (dataset, path) in weights:", "if False:"),
        ("a weight of 0 is accepted", "if not words or weight == 0:", "if not words:"),
        (
            "documents are held out although others are validated on",
            "and validation.dataset is None:\n        held_out_share",
            ":\n        held_out_share",
        ),
    ],
    "torchtrain/config/toml.py": [
        ("DEL is not escaped", '.replace("\\x7f", "\\\\u007F")', ""),
        (
            "the config file's own name is written",
            'left_out = [("job", "config_file")]',
            "left_out = []",
        ),
        (
            "steps are written beside the tokens that replace them",
            'left_out.append(("training", "steps"))',
            "pass",
        ),
    ],
    "torchtrain/catalog/llama.py": [
        (
            "Llama 3.2's 3B has the 1B's depth",
            "dim=3072, n_layers=28, n_heads=24",
            "dim=3072, n_heads=24",
        ),
    ],
    "torchtrain/catalog/identity.py": [
        (
            "another model's checkpoint is loaded",
            "    if accept_changes:\n",
            "    if True:\n",
        ),
        (
            "models of two families are one",
            "if _find_class(saved.family) != _find_class(current.family):",
            "if False:",
        ),
        (
            "the details of a scaling that is off are compared",
            "if before.rope_scaling_factor == now.rope_scaling_factor == 1:",
            "if False:",
        ),
        (
            "the details of a scaling are never compared",
            "if before.rope_scaling_factor == now.rope_scaling_factor == 1:",
            "if True:",
        ),
        (
            "the details of experts that are not there are compared",
            "if before.n_experts == now.n_experts == 0:",
            "if False:",
        ),
        (
            "a head width written out is another model",
            "if before.width_per_head == now.width_per_head:",
            "if False:",
        ),
        (
            "a field that an old checkpoint lacks is a difference",
            "before = {**defaults, **saved.shape}",
            "before = dict(saved.shape)",
        ),
        (
            "changes of rounding are told as changes of results",
            'return "; ".join(parts), bool(results)',
            'return "; ".join(parts), bool(parts)',
        ),
    ],
    "torchtrain/catalog/schedules.py": [
        (
            "a V gives each rank two neighbors",
            "return [rank, stages - 1 - rank]",
            "return [2 * rank, 2 * rank + 1]",
        ),
        ("the first stage is not lighter", "counts[0] -= first_less", "counts[0] -= 0"),
        (
            "a stage in the middle may be empty",
            "if min(counts) < 0 or 0 in counts[1:-1]:",
            "if min(counts) < 0:",
        ),
        (
            "too few microbatches are accepted",
            'if needs == "stages" and microbatches < stages:',
            'if needs == "stages" and microbatches < stages - 1:',
        ),
    ],
    "torchtrain/models/llama.py": [
        ("the final norm is left out", "self.output(self.norm(h))", "self.output(h)"),
        (
            "no residual around the feed-forward",
            "return h + feed_forward(",
            "return feed_forward(",
        ),
        ("the gate is not activated", "F.silu(self.w1(x)) * self.w3(x)", "self.w1(x) * self.w3(x)"),
        (
            "gate and value are swapped",
            "F.silu(self.w1(x)) * self.w3(x)",
            "F.silu(self.w3(x)) * self.w1(x)",
        ),
        (
            "norm_eps is not handed to the block's norms",
            "self.ffn_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)",
            "self.ffn_norm = nn.RMSNorm(shape.dim)",
        ),
        (
            "norm_eps is not handed to the final norm",
            "self.norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)\n        self.output",
            "self.norm = nn.RMSNorm(shape.dim)\n        self.output",
        ),
        (
            "the deviation does not shrink with depth",
            "0.02 / math.sqrt(2 * (layer + 1))",
            "0.02 / math.sqrt(2)",
        ),
        (
            "the deviation shrinks as if layers were counted from 0",
            "2 * (layer + 1)",
            "2 * max(layer, 1)",
        ),
        ("all weights are drawn with one deviation", "return self.shape.dim**-0.5", "return 0.02"),
        ("a tied embedding starts at 1", "0.02 if self.shape.tied_embeddings else 1.0", "1.0"),
        (
            "w2 starts as wide as w1",
            '    "feed_forward.w2.weight",',
            '    "feed_forward.w4.weight",',
        ),
        (
            "flops leave out the key and value projections",
            "2 * (q_width + kv_width)",
            "(2 * q_width + kv_width)",
        ),
        (
            "flops count the attention's square once",
            "12.0 * shape.n_layers * q_width",
            "6.0 * shape.n_layers * q_width",
        ),
        (
            "flops leave out the shared experts",
            "shape.experts_per_token + shape.n_shared_experts",
            "shape.experts_per_token",
        ),
        (
            "flops count all experts",
            "experts * 3 * shape.width",
            "shape.n_experts * 3 * shape.width",
        ),
    ],
    "torchtrain/models/moe.py": [
        (
            "the router decides in the compute precision",
            "F.linear(x.float(), self.weight.float())",
            "F.linear(x, self.weight).float()",
        ),
        ("scores are always softmax", 'shape.router_scores == "softmax"', "True"),
        ("scores are always divided by their sum", "if shape.router_renormalize:", "if True:"),
        ("the router's scale is forgotten", "weights * shape.router_scale", "weights * 1.0"),
        (
            "shared experts compute nothing",
            "mixed + self.shared_experts(tokens).view_as(x)",
            "mixed",
        ),
        (
            "the copies of a token share a gradient",
            "-1, ctx.copies)).sum(dim=1)",
            "-1, ctx.copies)).mean(dim=1)",
        ),
        (
            "an idle expert keeps the kernel's gradient",
            "gradient.masked_fill((counts == 0).view(-1, 1, 1), 0.0), None",
            "gradient, None",
        ),
        ("widths of any bytes go to the kernel", "% 16 == 0 for width", "% 1 == 0 for width"),
        (
            "all experts are idle",
            "(n_experts - self.shape.experts_per_token)",
            "n_experts",
        ),
        (
            "the bias is part of the weights",
            "weights = scores.gather(-1, experts)",
            "weights = (scores if bias is None else scores + bias).gather(-1, experts)",
        ),
        (
            "the balance loss has no gradient",
            "gradient, torch.ones_like(losses), None, None",
            "gradient, torch.zeros_like(losses), None, None",
        ),
        (
            "the scores of a sequence are summed, not averaged",
            "* loads * shares.sum(dim=1) / tokens).sum()",
            "* loads * shares.sum(dim=1)).sum()",
        ),
        (
            "the bias is cast with the weights",
            "            self.expert_bias = self.expert_bias.float()\n",
            "            pass\n",
        ),
    ],
    "torchtrain/models/cpu_attention.py": [
        (
            "keys of later queries are seen",
            ">= positions[None, keys]",
            "> positions[None, keys] - 2",
        ),
        (
            "the scores are rounded to bf16",
            "scores = scaled_q[:, :, queries] @ wide_k[:, :, keys].mT",
            "scores = (q[:, :, queries] * scale @ k[:, :, keys].mT).to(wide)",
        ),
        (
            "the keys' gradient is of the last block alone",
            "grad_k = grad_k + F.pad",
            "grad_k = F.pad",
        ),
        (
            "the scale is left out of the gradient",
            "(grad_weights - mean) * scale",
            "(grad_weights - mean)",
        ),
    ],
    "torchtrain/models/attention.py": [
        ("attention sees the future", "is_causal=True", "is_causal=False"),
        (
            "keys are not rotated",
            "rotate(q, rotations), rotate(k, rotations)",
            "rotate(q, rotations), k",
        ),
        ("keys are not normalized", "self.q_norm(q), self.k_norm(k)", "self.q_norm(q), k"),
        (
            "on a GPU fp32 keeps all scores of grouped heads",
            'return q.device.type == "cpu" or q.dtype != torch.float32',
            "return True",
        ),
        (
            "each query head has the keys of another",
            "k.repeat_interleave(share, dim=1), v.repeat",
            "k.repeat(1, share, 1, 1), v.repeat",
        ),
    ],
    "torchtrain/models/rotary.py": [
        (
            "rope_theta is a constant",
            "1.0 / shape.rope_theta**exponents",
            "1.0 / 10000.0**exponents",
        ),
        (
            "positions do not restart in a document",
            "positions if documents is None else positions - documents",
            "positions",
        ),
        (
            "RoPE's scaling is not applied",
            "if shape.rope_scaling_factor == 1.0:",
            "if shape.rope_scaling_factor >= 1.0:",
        ),
        (
            "RoPE's scaling keeps the low frequencies",
            "(kept + (1 - kept) / shape.rope_scaling_factor)",
            "(kept / shape.rope_scaling_factor + (1 - kept))",
        ),
        (
            "pairs turn the other way",
            "torch.polar(torch.ones_like(angles), angles)",
            "torch.polar(torch.ones_like(angles), -angles)",
        ),
        (
            "the compiled rotation has a sign wrong",
            "even * sin + odd * cos",
            "odd * cos - even * sin",
        ),
    ],
    "torchtrain/models/document_masking.py": [
        (
            "a query sees the whole of its document",
            "same_document.tril().unsqueeze(1)",
            "same_document.unsqueeze(1)",
        ),
        ("the mask in blocks leaves out the own position", "(query >= key) &", "(query > key) &"),
    ],
    "torchtrain/models/decoder.py": [
        (
            "the tie is not made again after a move",
            "        super()._apply(fn, recurse)\n        self.tie()\n",
            "        super()._apply(fn, recurse)\n",
        ),
    ],
    "torchtrain/parallelisms/expert_parallel.py": [
        (
            "rows are not sorted by expert",
            "rows = Permute.apply(rows, order, inverse, 1)\n        rows = experts",
            "rows = experts",
        ),
        (
            "gradients of rows are not sent back",
            "return ctx.exchange.run(gradient, sent, received), None, None, None",
            "return ctx.exchange.run(gradient, received, received), None, None, None",
        ),
        (
            "loads of a sequence are those of a shard",
            "        dist.all_reduce(total, group=group)\n",
            "        pass\n",
        ),
    ],
    "torchtrain/parallelisms/overlap.py": [
        (
            "both lanes run at once",
            "        self._changed.wait_for(lambda: self._turn == lane)  # a lane that ends hands over\n",
            "",
        ),
        (
            "a lane that has failed leaves the other one waiting",
            "            self._turn = OTHER[lane]\n            self._changed.notify_all()\n\n\ndef",
            "            self._changed.notify_all()\n\n\ndef",
        ),
        (
            "the second fault is raised",
            "self._fault = self._fault or fault",
            "self._fault = fault or self._fault",
        ),
        (
            "exchanges are not handed over",
            "                module.exchange.between = lanes.hand_over\n",
            "                pass\n",
        ),
    ],
    "torchtrain/optimizers/build.py": [
        (
            "weights of several meshes are updated together",
            'for parameters in split_by_mesh(part["params"])',
            'for parameters in [part["params"]]',
        ),
        (
            "the matched parameters come first",
            """    split = [{**group, "params": parameters[None]}]
""",
            """    split = [{**group, "params": parameters[None]}] if parameters[None] else []
""",
        ),
        (
            "a group's decay is not set",
            "changed: dict[str, Any] = dict(setting.changes)",
            'changed: dict[str, Any] = {"lr": setting.changes.get("lr", group["lr"])}',
        ),
        (
            "an optimizer inside another keeps its own group",
            "        group.update(first)",
            "        group = {**group, **first}",
        ),
        (
            "norms decay too",
            '"params": vectors, "weight_decay": 0.0',
            '"params": vectors, "weight_decay": weight_decay',
        ),
        (
            "matrices do not decay",
            '"params": matrices, "weight_decay": weight_decay',
            '"params": matrices, "weight_decay": 0.0',
        ),
    ],
    "torchtrain/optimizers/muon.py": [
        (
            "updates are scaled by the shorter side",
            "max(weight.shape[-2:])",
            "min(weight.shape[-2:])",
        ),
        (
            "the momentum takes the gradient's share for its own",
            'momentum.lerp_(gradient, 1 - group["momentum"])',
            'momentum.lerp_(gradient, group["momentum"])',
        ),
        (
            "a tall matrix takes the larger Gram matrix",
            "is_tall = matrix.size(0) > matrix.size(1)",
            "is_tall = False",
        ),
        (
            "a weight without a gradient decays",
            """            if weight.grad is None:
                continue
""",
            "",
        ),
        ("experts are AdamW's", "weight.ndim in (2, 3)", "weight.ndim == 2"),
        (
            "what AdamW updates keeps Muon's rate",
            'group["lr"] = config.muon_adamw_lr',
            'group["lr"] = config.lr',
        ),
    ],
    "torchtrain/optimizers/shared_work.py": [
        (
            "replicas send their copies of a part too",
            """                if holding.replicas[here] == replica:
""",
            """                if holding.boxes:
""",
        ),
        (
            "the lowest rank owns all matrices",
            "while queue[0][0] != loads[queue[0][1]]:",
            "while False:",
        ),
        (
            "a stack's matrices are counted from its beginning",
            "row = matrix.row - start",
            "row = matrix.row",
        ),
        (
            "a holder may have none of the matrix",
            "return part if all(part.shape) else None",
            "return part",
        ),
    ],
    "torchtrain/config/parameter_groups.py": [
        ("a parameter may be in two groups", "if len(found) > 1:", "if len(found) > 2:"),
        (
            "a pattern is for the beginnings of names",
            "if fnmatchcase(name, group.pattern))",
            'if fnmatchcase(name, group.pattern + "*"))',
        ),
    ],
    "torchtrain/optimizers/adam.py": [
        (
            "AdamW's betas are swapped",
            '"betas": (config.beta1, config.beta2)',
            '"betas": (config.beta2, config.beta1)',
        ),
        ("AdamW's epsilon is PyTorch's default", '        "eps": config.eps,\n', ""),
        ("Adam is AdamW", "return torch.optim.Adam(", "return torch.optim.AdamW("),
    ],
    "torchtrain/parallelisms/replica_check.py": [
        (
            "what the optimizer keeps is not compared",
            "        for state in self._states_of(tensor):\n",
            "        for state in ():\n",
        ),
        (
            "the hash of a large tensor is that of its end",
            "            total = total * BASE + (words",
            "            total = (words",
        ),
        (
            "numbers may change places",
            "(words * factors[: len(words)]).sum()",
            "words.long().sum()",
        ),
        (
            "whatever has one name is compared",
            '[f"{name} {find_local_box(tensor)}" for',
            '[f"{name} {tensor.shape}" for',
        ),
        (
            "no check is due",
            "return self.freq > 0 and step % self.freq == 0",
            "return self.freq > 0 and step % self.freq == 1",
        ),
        (
            "the ranks that differ are not told apart",
            "found[int(by_rank[place])].append(place // self.width)",
            "found[int(by_rank[place])].append(0)",
        ),
    ],
    "torchtrain/bad_numbers.py": [
        (
            "a batch without a valid label trains",
            "        if summary.valid_labels == 0:\n",
            "        if summary.valid_labels < 0:\n",
        ),
        (
            "a non-finite gradient with a finite loss is let through",
            "return math.isfinite(summary.loss) and math.isfinite(summary.grad_norm)",
            "return math.isfinite(summary.loss)",
        ),
        (
            "a non-finite loss with a finite gradient is let through",
            "return math.isfinite(summary.loss) and math.isfinite(summary.grad_norm)",
            "return math.isfinite(summary.grad_norm)",
        ),
        (
            "one more step in a row is skipped",
            "self.in_a_row <= limit",
            "self.in_a_row <= limit + 1",
        ),
        (
            "skipped steps are counted in a row though good ones lie between",
            "            self.in_a_row = 0\n        else:",
            "            pass\n        else:",
        ),
        (
            "a spike does not enter the past",
            "            self.recent.append(numbers)\n",
            "            if fault is None:\n                self.recent.append(numbers)\n",
        ),
        (
            "a drop is a spike",
            "if value - mean > deviations * deviation:",
            "if abs(value - mean) > deviations * deviation:",
        ),
        (
            "a spike is seen from the second step on",
            "if len(recent) < max(2, recent.maxlen // 2):",
            "if len(recent) < 2:",
        ),
        (
            "the deviation is that of a whole population",
            "squares / (len(before) - 1)",
            "squares / len(before)",
        ),
        (
            "the parameter of the lowest rank is named, not the model's first",
            "        first = min(found)\n",
            "        first = found[0]\n",
        ),
        (
            "a resumed run has skipped none in a row",
            "            self.in_a_row = saved.in_a_row\n",
            "",
        ),
    ],
    "torchtrain/optimizers/clipping.py": [
        (
            "each gradient is scaled by a kernel of its own",
            "torch._foreach_mul_([local(gradient) for gradient in gradients], scale)",
            "[local(gradient).mul_(scale) for gradient in gradients]",
        ),
        ("gradients are scaled up to the norm", ".clamp(max=1.0)", ""),
        (
            "clipping hides which gradient is not finite",
            ".where(norm.isfinite(), 1.0)",
            "",
        ),
        (
            "the norm of other pipeline stages is left out",
            "    if stages is not None:\n        dist.all_reduce(total, group=stages)\n",
            "",
        ),
        (
            "the norm of other shards is left out",
            "            dist.all_reduce(subtotal, group=mesh.get_group(dim))\n",
            "            pass\n",
        ),
        (
            "the norm is summed without squares",
            "torch.cat(norms_of_rows).double().square().sum()",
            "torch.cat(norms_of_rows).double().sum()",
        ),
        (
            "the norm that is returned is the clipped one",
            "    return norm\n",
            "    return norm * scale\n",
        ),
    ],
    "torchtrain/parallelisms/initial_weights.py": [
        (
            "debug.seed does not reach the weights",
            'f"{seed}/{name}".encode()',
            'f"0/{name}".encode()',
        ),
        (
            "a parameter's name is not part of its seed",
            'f"{seed}/{name}".encode()',
            'f"{seed}".encode()',
        ),
        ("norm weights start at 0.9", "whole.fill_(1.0)", "whole.fill_(0.9)"),
        ("values are not cut off", "CUTOFF = 3.0", "CUTOFF = 30.0"),
        (
            "devices that draw other weights train on",
            "    if len({digest for _, digest in kinds}) == 1:\n",
            "    if True:\n",
        ),
        (
            "a run does not go on from its checkpoint on other devices",
            "    if not loads:\n",
            "    if True:\n",
        ),
        (
            "weights are drawn in the parameter's precision",
            "torch.empty(parameter.shape, dtype=torch.float32, device=device)",
            "torch.empty(parameter.shape, dtype=parameter.dtype, device=device)",
        ),
    ],
    "torchtrain/shards.py": [
        ("whole tensors are counted once per rank", "if not placement.is_replicate():", "if True:"),
        (
            "each rank takes the first shard",
            "skipped = min(coordinate[mesh_dim] * size, length)",
            "skipped = 0",
        ),
        (
            "FSDP's cut of a tensor-parallel shard is taken first",
            "return isinstance(cut[1], _StridedShard)",
            "return not isinstance(cut[1], _StridedShard)",
        ),
    ],
    "torchtrain/models/hf_names.py": [
        (
            "rows of heads keep their order",
            "return weight.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)",
            "return weight",
        ),
        ("the norm of keys keeps its order", ', "k_norm.weight")', ")"),
    ],
    "torchtrain/models/hf_config.py": [
        ("a window is passed over", "if window is not None and", "if False and"),
        ("Llama's scaling is passed over", 'if kind == "default":', "if True:"),
    ],
    "torchtrain/checkpoint/hf_folder.py": [
        (
            "a slice begins at its head's first row",
            ".narrow(0, start - first_row, length)",
            ".narrow(0, 0, length)",
        ),
        ("what is missing is not looked for", "        if found:\n", "        if False:\n"),
    ],
    "torchtrain/checkpoint/foreign.py": [
        (
            "a rank's part is that of the first",
            "box = find_local_box(weight)",
            "box = [(0, size) for size in local(weight).shape]",
        ),
        ("weights of another shape are taken", "    if found:\n", "    if False:\n"),
    ],
    "torchtrain/parallelisms/fsdp.py": [
        (
            "experts are cut as if each rank had them all",
            "parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape",
            "parameter.shape",
        ),
        (
            "gradients are averaged over the ranks",
            "set_gradient_divide_factor(1.0)",
            "set_gradient_divide_factor(2.0)",
        ),
        (
            "gradients are reduced in the compute precision",
            "reduce_dtype=DTYPES[training.mixed_precision_reduce]",
            "reduce_dtype=DTYPES[training.mixed_precision_param]",
        ),
        (
            "resharding is always on",
            'frees_blocks = reshard_after_forward != "never"',
            "frees_blocks = True",
        ),
    ],
    "torchtrain/parallelisms/expert_balance.py": [
        ("tokens are counted on this rank alone", "        dist.all_reduce(self.sums)\n", ""),
        ("counts go on from step to step", "        self.totals.zero_()\n", ""),
        (
            "the bias of a full expert rises",
            "(loads.mean(dim=1, keepdim=True) - loads).sign()",
            "(loads - loads.mean(dim=1, keepdim=True)).sign()",
        ),
        ("the bias moves by its lack of load", "- loads).sign().float()", "- loads).float()"),
        (
            "the balance loss is weighed per token",
            "section.balance_loss_weight / sequences",
            "section.balance_loss_weight / self.tokens",
        ),
        (
            "the worst layer is the mean layer",
            'of_layers["load_max"].max()',
            'of_layers["load_max"].mean()',
        ),
        (
            "stages name their own layers alone",
            "for layer, value in zip(self.layers, values, strict=True):\n",
            "for layer, value in zip(self.layers, values, strict=True):\n                    if self.layers.index(layer) in self.own:\n    ",
        ),
    ],
    "torchtrain/parallelisms/tensor_parallel.py": [
        (
            "an empty share of the vocabulary is accepted",
            "if rows * (ranks - 1) >= vocab_size:",
            "if rows * (ranks - 1) > vocab_size:",
        ),
        (
            "sequence parallelism cannot be switched off",
            "Replicate() if parallelism.disable_sequence_parallel else Shard(1)",
            "Shard(1)",
        ),
    ],
    "torchtrain/parallelisms/context_parallel.py": [
        (
            "shards of headtail are two neighbors",
            "chunks[ring.rank], chunks[-1 - ring.rank]",
            "chunks[2 * ring.rank], chunks[2 * ring.rank + 1]",
        ),
        (
            "positions do not restart in documents that are sharded",
            "            positions = positions - documents\n",
            "            pass\n",
        ),
        (
            "gradients of an exchange are not exchanged",
            "return exchange_parts(grad, ctx.group), None",
            "return grad, None",
        ),
    ],
    "torchtrain/parallelisms/ring_attention.py": [
        (
            "later ranks' keys are seen whole",
            "return Seen(rows=second_half, columns=everything, causal=False)",
            "return Seen(rows=everything, columns=everything, causal=False)",
        ),
        (
            "partial results are not weighed",
            "added = (part.lse - whole_lse).exp().unsqueeze(-1)",
            "added = (part.lse - part.lse).exp().unsqueeze(-1)",
        ),
        (
            "gradients of shared heads are not summed in fp32",
            "sum(dim=2, dtype=torch.float32)",
            "sum(dim=2)",
        ),
        (
            "the gradient of rotated keys is overwritten",
            "grad_kv = collectives.wait_tensor(traveling) + grad_kv",
            "collectives.wait_tensor(traveling)",
        ),
    ],
    "torchtrain/parallelisms/activation_checkpoint.py": [
        ("every other layer means all", "if int(layer) % every == 0:", "if int(layer) >= 0:"),
        (
            "op saves every product",
            "is_saved = seen[context.is_recompute] % every == 0",
            "is_saved = True",
        ),
        (
            "the recomputation counts on from the forward",
            "            seen[context.is_recompute] += 1",
            "            seen[False] += 1\n            seen[True] += 1",
        ),
        (
            "the budget of the compiler stays on",
            "config.memory_budget if uses_budget else 1.0",
            "config.memory_budget",
        ),
    ],
    "torchtrain/parallelisms/pipeline_parallel.py": [
        (
            "PyTorch divides by the microbatches again",
            "            loss_fn=self._loss,\n            scale_grads=False,",
            "            loss_fn=self._loss,\n            scale_grads=True,",
        ),
        (
            "an evaluation divides the losses it returns",
            "        self.losses.append(losses.detach())\n",
            "        self.losses.append(losses.detach() / self.divisor)\n",
        ),
        (
            "gathered weights stay after a pipeline's evaluation",
            "REDUCE_GRAD)\n    return [action",
            "REDUCE_GRAD, schedules.RESHARD)\n    return [action",
        ),
        ("a tied output's gradient is not handed in", "        self.tied.hand_in_gradient()\n", ""),
        (
            "a tied output keeps its first weight",
            "        self.tied.take_weight()\n        self.losses = []\n",
            "        self.losses = []\n",
        ),
        (
            "a split backward adds up in the compute precision",
            "                    parameter.to_accumulated_grad_if_needed()\n",
            "",
        ),
    ],
    "torchtrain/datasets/documents.py": [
        (
            "a document's end predicts the next one's beginning",
            "    labels[is_beginning] = IGNORE_INDEX\n",
            "",
        ),
        (
            "documents begin one token late",
            "begins[:, 1:] |= labels[:, :-1] == IGNORE_INDEX",
            "begins[:, 1:] |= labels[:, 1:] == IGNORE_INDEX",
        ),
    ],
    "torchtrain/datasets/data_order.py": [
        ("epochs have one order", "data order {seed} {epoch}", "data order {seed}"),
        ("seeds have one order", "data order {seed} {epoch}", "data order {epoch}"),
        ("values at the border are let through", "outside = values >= n", "outside = values > n"),
    ],
    "torchtrain/datasets/samples.py": [
        (
            "sequences do not overlap by a token",
            "self.n_samples, self.seed) * self.seq_len\n",
            "self.n_samples, self.seed) * (self.seq_len + 1)\n",
        ),
        (
            "the last whole sequence is dropped",
            "labels = len(self._tokens) - 1\n",
            "labels = len(self._tokens) - 2\n",
        ),
        ("the seed is not part of the identity", '            "seed": self.seed,\n', ""),
    ],
    "torchtrain/datasets/mixture.py": [
        (
            "a mixture counts a sample too many",
            "int(np.searchsorted(indices, rest))",
            'int(np.searchsorted(indices, rest, side="right"))',
        ),
        (
            "a source's number forgets earlier periods",
            "periods * per_period[sources] + self._numbers[indices]",
            "self._numbers[indices]",
        ),
    ],
    "torchtrain/datasets/packing.py": [
        (
            "a packing that is there needs a lock",
            "    if target.exists():  # then",
            "    if False:  # then",
        ),
        (
            "long documents lose the token at the cut",
            "offsets = numbers * seq_len\n",
            "offsets = numbers * (seq_len + 1)\n",
        ),
        (
            "packing takes the emptiest sequence",
            "(fitting & -fitting).bit_length() - 1",
            "fitting.bit_length() - 1",
        ),
        (
            "labels go over from one document to the next",
            "labels[sample, begin : end - 1] = segment[1:]\n",
            "labels[sample, max(begin - 1, 0) : end - 1] = segment[0 if begin else 1 :]\n",
        ),
        (
            "the sequence length is not part of the packing's key",
            "*fingerprints, str(seq_len)]",
            "*fingerprints]",
        ),
        ("a single token makes a sequence", "segments[:, 1] > 1", "segments[:, 1] > 0"),
    ],
    "torchtrain/datasets/loader.py": [
        (
            "steps overlap by a batch",
            'steps = step - 1 - self._origin["step"]',
            'steps = max(0, step - 2 - self._origin["step"])',
        ),
        (
            "every data rank reads the first share",
            "slice(self.data_rank * share, (self.data_rank + 1) * share)",
            "slice(0, share)",
        ),
        (
            "the position of a stream is the least read",
            "max(position, positions[number])",
            "min(position, positions[number])",
        ),
        (
            "an epoch's begin is told a step late",
            "begun > math.ceil(before[name])",
            "begun > math.floor(before[name]) + 1",
        ),
        (
            "the state's step is not checked",
            'if saved["samples_consumed"] != consumed:',
            "if False:",
        ),
        (
            "documents are not kept apart in microbatches",
            "if separators is not None:\n        documents =",
            "if separators is None:\n        documents =",
        ),
        (
            "ranks do not wait for each other's streams",
            "            self._ahead.wait_for_all(step, waiting, stop_reason)\n",
            "            pass\n",
        ),
    ],
    "torchtrain/datasets/read_ahead.py": [
        (
            "a stream that stalls is waited for",
            ">= self.stall_timeout_s:",
            ">= 1000 * self.stall_timeout_s:",
        ),
        (
            "ranks wait until one is ready",
            "op=dist.ReduceOp.MAX",
            "op=dist.ReduceOp.MIN",
        ),
        (
            "a stop waits for a stream",
            "            if reason:\n                raise Stopped(reason, step - 1)\n",
            "",
        ),
        ("the steps ahead are not bounded", "<= STEPS_AHEAD:", "<= 100 * STEPS_AHEAD:"),
        (
            "a fault waits for the step to be taken",
            "            result.result()  # raises what the reading raised\n",
            "",
        ),
    ],
    "torchtrain/datasets/data_state.py": [
        (
            "old positions come in the order of their names",
            "positions[source, int(stream)] =",
            "positions[source, stream] =",
        ),
        (
            "an old state's origin is forgotten",
            '{"step": step, "sample": sample}',
            '{"step": 0, "sample": 0}',
        ),
        (
            "a changed global batch size is not seen",
            '"global_batch_size": state["global_batch_size"]}',
            '"global_batch_size": 0}',
        ),
    ],
    "torchtrain/parallelisms/mesh.py": [
        (
            "replicas read the same share",
            "replica * self.degrees.dp_shard + self.rank_along",
            "self.rank_along",
        ),
        ("FSDP does not shard over context ranks", 'if self.has("cp"):', "if False:"),
    ],
    "torchtrain/parallelisms/apply.py": [
        ("a tied output is a weight of its own", "if not is_copy:", "if True:"),
    ],
    "torchtrain/text_samples.py": [
        (
            "texts get longer than training's sequences",
            "written == self.section.max_new_tokens or len(text) == self.length",
            "written == self.section.max_new_tokens",
        ),
        (
            "a text goes on after EOS",
            "token == self.tokenizer.eos_id or self._is_full(texts[row], row)",
            "self._is_full(texts[row], row)",
        ),
        (
            "every step draws the same",
            "/{step}/",
            "/",
        ),
        (
            "a text's last token but one is continued",
            "draws[row, len(text) - 1] =",
            "draws[row, len(text) - 2] =",
        ),
        (
            "ids beyond the tokenizer's are chosen",
            "of_token[: self.tokenizer.vocab_size].float()",
            "of_token.float()",
        ),
        (
            "a tensor-parallel rank chooses from its share of the vocabulary",
            "of_token = of_token.full_tensor()",
            "of_token = of_token.to_local()",
        ),
        (
            "nothing is written after the last step",
            "is_turn = step % self.section.freq == 0 or step == self.last_step",
            "is_turn = step % self.section.freq == 0",
        ),
    ],
    "torchtrain/validation.py": [
        (
            "each rank leaves a validation by itself",
            "reason = self._agree(stop_reason())",
            "reason = stop_reason()",
        ),
        (
            "validation reads past its limit",
            "np.where(first + own < self.sequences, first + own, -1)",
            "np.where(first + own < self.samples.n_samples, first + own, -1)",
        ),
        (
            "validation.steps may ask for more than there is",
            "self.sequences = min(self.sequences, self.plan.max_sequences)",
            "self.sequences = plan.max_sequences",
        ),
        (
            "data ranks validate on the same sequences",
            "np.arange(size) + self.data_rank * size",
            "np.arange(size)",
        ),
        ("bits per byte are nats", "loss / math.log(2) / text_bytes", "loss / text_bytes"),
        (
            "validation starts from a prefix of the corpus",
            "samples = np.where(numbers < 0, -1, order)",
            "samples = numbers",
        ),
        (
            "the last step does not validate",
            "is_turn = step % self.plan.freq == 0 or step == self.plan.last_step",
            "is_turn = step % self.plan.freq == 0",
        ),
        (
            "hidden labels count as bytes",
            "token_bytes[batch.labels.clamp(min=0)].where(is_valid, 0.0)",
            "token_bytes[batch.labels.clamp(min=0)]",
        ),
        (
            "documents of a validation are not kept apart",
            "microbatches(tokens, labels, numbers, len(numbers), self.separators)",
            "microbatches(tokens, labels, numbers, len(numbers), None)",
        ),
        (
            "the loss of tensor ranks is added",
            "loss = totals[0].item() / self.degrees.tp",
            "loss = totals[0].item()",
        ),
        (
            "fingerprints of a validation set are not compared",
            'return "; ".join(dataset.fingerprint for dataset in self.datasets)',
            'return ""',
        ),
    ],
    "torchtrain/datasets/tokenizer.py": [
        (
            "what a tokenizer does not know ends the document",
            "return own[own != self.unknown_id] if self._drops_unknown else own",
            "return own",
        ),
        (
            "documents have no EOS",
            "np.concatenate((bos, ids, eos), dtype",
            "np.concatenate((bos, ids), dtype",
        ),
        (
            "ids of a byte have no size",
            "elif model.is_byte(id_):\n                sizes[id_] = 1",
            "elif model.is_byte(id_):\n                sizes[id_] = 0",
        ),
        (
            "a space mark in the text becomes a space",
            "text) if self._space_mark_ids else [text]",
            "text) if False else [text]",
        ),
        (
            "an unknown token that is special stands for no byte",
            "sizes[self.unknown_id] = np.nan\n        return sizes\n\n\ndef",
            "pass\n        return sizes\n\n\ndef",
        ),
        (
            "a folder's tokenizer.model is taken first",
            '("tokenizer.json", "tokenizer.model")',
            '("tokenizer.model", "tokenizer.json")',
        ),
        (
            "a tokenizer without EOS is accepted",
            "if self.eos_id < 0:",
            "if self.eos_id < -1:",
        ),
        (
            "a prompt of a tokenizer without BOS begins with another token",
            "[] if tokenizer.bos_id is None else [tokenizer.bos_id]",
            "[tokenizer.bos_id or 0]",
        ),
        (
            "long texts are cut inside words",
            "space = WORD_BEGINS.search(text, start + LONG_TEXT)",
            "space = re.compile('').search(text, start + LONG_TEXT)",
        ),
    ],
    "torchtrain/datasets/special_tokens.py": [
        (
            "a text spells the special tokens of a Unigram",
            "return {piece for piece, _ in model",
            "return set() & {piece for piece, _ in model",
        ),
        (
            "a text spells the token of a byte",
            "return any(BYTE.fullmatch(name) for name in found)",
            "return False",
        ),
        (
            "a text spells the token of a byte that is an added one too",
            'if token["content"] not in in_model]',
            "if True]",
        ),
        (
            "a text spells a special token that a merge makes",
            "if not names & {_join(merge, model), *_parts(merge)}",
            "if True",
        ),
        (
            "a text spells the special tokens of a BPE that ignores its merges",
            'model["type"] != "BPE" or model["ignore_merges"]:',
            'model["type"] != "BPE":',
        ),
    ],
    "torchtrain/datasets/round_trip.py": [
        (
            "a stream is condemned for the few characters at its beginning",
            "tried.say(is_enough=has_all or tried.seen >= FIRST_CHARACTERS)",
            "tried.say()",
        ),
        (
            "what is slow reads on beside the streams",
            "    is_over.set()",
            "    is_over.clear()",
        ),
        (
            "what the tokenizer loses is not refused",
            "if 2 * self.lost.total() > self.characters:",
            "if False:",
        ),
        (
            "streams begin on whatever is lost",
            "    for text in list(texts):\n        tried.add(text)\n",
            "",
        ),
        (
            "a source of streams that hangs is waited for",
            "reading.join(FIRST_SECONDS)",
            "reading.join()",
        ),
        (
            "an unknown token is text that came back",
            "ids[ids != tokenizer.unknown_id]",
            "ids",
        ),
    ],
    "torchtrain/datasets/token_file.py": [
        (
            "an id beyond the vocabulary is accepted",
            "<= highest < tokenizer.vocab_size",
            "<= highest <= tokenizer.vocab_size",
        ),
        (
            "a negative id is accepted",
            "if not 0 <= lowest <=",
            "if not -1 <= lowest <=",
        ),
        (
            "a file of half an id is accepted",
            "if size % dtype.itemsize or size == 0:",
            "if size == 0:",
        ),
        (
            "a cache that cannot be written is of no use",
            "    facts = load_facts(seen, find_state()[0])\n",
            "    facts: dict[str, Any] = {}\n",
        ),
        (
            "only the first token of each chunk is hashed",
            "digest.update(chunk.data)",
            "digest.update(chunk[:1].data)",
        ),
    ],
    "torchtrain/datasets/token_cache.py": [
        (
            "a vocabulary of 65,536 needs four bytes",
            "tokenizer.vocab_size <= 1 << 16",
            "tokenizer.vocab_size < 1 << 16",
        ),
        (
            "ids are cut to two bytes",
            "np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32",
            "np.uint16",
        ),
        (
            "the tokenizer is not part of a cache's key",
            "short_hash([str(FORMAT), corpus_fingerprint, tokenizer.fingerprint])",
            "short_hash([str(FORMAT), corpus_fingerprint])",
        ),
        (
            "a cache of the wrong size is opened",
            "        if size != expected:",
            "        if size < 0:",
        ),
        (
            "a corpus that changes between its two readings is kept",
            "        if contents != self.contents:\n",
            "        if False:\n",
        ),
        (
            "a build that resumes repeats a shard",
            "file.truncate(tokens * itemsize)",
            "file.seek(0, 2)",
        ),
        (
            "documents are hashed without their lengths",
            '            digest.update(len(data).to_bytes(8, "little"))\n',
            "",
        ),
        (
            "what an old cache does not say is not tried",
            "    if manifest.characters_sampled is None:\n",
            "    if False:\n",
        ),
        (
            "a complete cache that cannot be written is of no use",
            "        if not _has_tokens_of(tokenizer, folder):\n",
            "        if True:\n",
        ),
        (
            "a cache keeps the name it was first read under",
            "replace(cache.manifest, source=corpus.name, files=len(corpus.files))",
            "cache.manifest",
        ),
    ],
    "torchtrain/datasets/cache_folder.py": [
        ("a relative XDG_CACHE_HOME is used", "if os.path.isabs(base):", "if base:"),
        (
            "a file that changed just now is remembered",
            "if newest < started - SETTLED_NS:",
            "if True:",
        ),
        (
            "a corpus that changes while it is read is kept",
            "    if find_state()[0] != state:\n",
            "    if False:\n",
        ),
    ],
    "torchtrain/datasets/corpora.py": [
        (
            "empty documents are learned",
            "        if not row.text:\n",
            "        if False:\n",
        ),
        (
            "bad rows are skipped unasked",
            'if self.on_bad_row == "error":',
            "if False:",
        ),
        (
            "documents at the border are on both sides",
            "_hash(row) < border",
            "_hash(row) <= border",
        ),
        (
            "lone surrogates are accepted",
            '        value.encode("utf-8")\n    except',
            "        pass\n    except",
        ),
        (
            "bytes that are text are not",
            "    if isinstance(value, bytes):\n",
            "    if False:\n",
        ),
        (
            "less is held out of a text than was asked for",
            'data.rfind(b"\\n", 0, target) + 1',
            'data.find(b"\\n", target) + 1',
        ),
    ],
    "torchtrain/datasets/files.py": [
        (
            "hidden files are read",
            'counting.search(name) and not name.startswith(".")',
            "counting.search(name)",
        ),
        (
            "files come in the system's order",
            "for name in sorted(found)]",
            "for name in found]",
        ),
        (
            "a library's duplicates are read twice",
            "if digest not in seen:",
            "if True:",
        ),
        ("a link that leads back is followed", "if real in entered:", "if False:"),
    ],
    "torchtrain/datasets/json_files.py": [
        ("lines are counted from 0", "start=blank + 1", "start=blank"),
        (
            "a byte-order mark stays in the first line",
            ".removeprefix(BYTE_ORDER_MARK)",
            "",
        ),
        (
            "a line that is cut by a break in the compressed data is a fault of its own",
            "if is_cut and isinstance(held, BadRow) and held.kind in OF_A_CUT_ROW:",
            "if False:",
        ),
        (
            "an array on several lines is read as lines",
            'if may_be_whole and first.lstrip().startswith(b"["):',
            "if False:",
        ),
    ],
    "torchtrain/datasets/hub.py": [
        (
            "a file of the user's that cannot be read is a closed cache",
            "        path.is_relative_to(cache) or cache.is_relative_to(path)\n",
            "        True\n",
        ),
        (
            "what was downloaded is of no use in a cache that cannot be written",
            "            _link_files(Path(datasets.config.HF_DATASETS_CACHE), Path(other), owner)\n",
            "",
        ),
        (
            "a cache of the hub that cannot be written ends the run",
            "if not _is_of_closed_cache(error):",
            "if True:",
        ),
    ],
    "torchtrain/datasets/compressed.py": [
        (
            "a name alone says that a file is compressed",
            'return named if named in FORMATS and not plain.match(beginning) else ""',
            'return named if named in FORMATS else ""',
        ),
        (
            "what is before a break is lost with it",
            "                yield from self._read_to_break(",
            "                self._read_to_break(",
        ),
        (
            "zeros after the end are a fault",
            'rest := rest.lstrip(b"\\0")',
            "rest := rest",
        ),
        ("a cut file is taken for a whole one", 'self.fault = "it ends too early"', "pass"),
        (
            "where the beginning of a part is damaged the file ends",
            "if self._beginning.search(rest):",
            "if False:",
        ),
    ],
    "torchtrain/datasets/streams.py": [
        (
            "another tokenizer resumes in the middle of a document",
            "            if not is_same_tokenizer:\n",
            "            if False:\n",
        ),
    ],
    "torchtrain/datasets/token_stream.py": [
        (
            "a stream's samples overlap by two tokens",
            "_drop(held, self.seq_len)",
            "_drop(held, self.seq_len - 1)",
        ),
        (
            "streams all read the first document",
            "(rows_before + row - self.number) % self.count == 0",
            "(rows_before + row) % self.count == 0",
        ),
        (
            "a resumed stream forgets where in its document it was",
            "yield self.start, tokens[self.start.token :]\n",
            "yield self.start, tokens\n",
        ),
        ("a stream's epochs do not begin at its first row", "                first_row = 0\n", ""),
        (
            "a stream without documents is waited for",
            "            if not has_document:\n",
            "            if False:\n",
        ),
    ],
    "torchtrain/checkpoint/checkpointer.py": [
        (
            "the optimizer's state is left out and loaded all the same",
            'if source.model_only or "optimizer" in source.left_out:',
            "if source.model_only:",
        ),
        (
            "a start sweeps nothing",
            "            self._on_rank_zero(lambda: commit.sweep(self.folder))\n",
            "            pass\n",
        ),
        (
            "a run goes on from weights alone",
            "_is_short(found.progress, count_steps):\n                logger",
            "_is_short(found.progress, lambda saved: 0):\n                logger",
        ),
        (
            "training starts over where no checkpoint is complete",
            "        if names:\n            raise SharedUserError",
            "        if False:\n            raise SharedUserError",
        ),
        (
            "weights alone bring the optimizer along",
            '        if source.model_only or "optimizer" in source.left_out:\n            optimizer = None\n',
            "",
        ),
        (
            "random states of another number of ranks are loaded",
            "if optimizer is not None and source.marker.world_size == dist.get_world_size():",
            "if optimizer is not None:",
        ),
        (
            "random states are not restored",
            "            state.set_random_states(random)\n",
            "",
        ),
        (
            "numbers of the optimizer are not restored",
            "            state.take_numbers(weights, optimizer, tensors)\n",
            "",
        ),
        (
            "later checkpoints are kept when a run goes back",
            "            if later > step:\n",
            "            if later > step + 1:\n",
        ),
        (
            "loading alone sets later checkpoints aside",
            "if is_own and optimizer is not None and not self.config.load_only:",
            "if is_own and optimizer is not None:",
        ),
        (
            "a marker need not name all shards",
            "        if fault is not None:\n            return fault\n        return Source(",
            "        return Source(",
        ),
        (
            "each rank hashes the first files alone",
            "sorted(marker.files)[dist.get_rank() :: dist.get_world_size()]",
            "sorted(marker.files)[:1]",
        ),
    ],
    "torchtrain/checkpoint/saving.py": [
        (
            "a rank that cannot copy leaves the others' threads waiting",
            "self._together(lambda: background.copy(tensors))",
            "background.copy(tensors)",
        ),
        (
            "rank 0's disk is the one that is timed",
            "self.save_seconds = max(gathered(seconds, self.group))",
            "self.save_seconds = gathered(seconds, self.group)[0]",
        ),
        (
            "each rank is thought to write all",
            "share = is_timed * sum(sizes.values()) // dist.get_world_size()",
            "share = is_timed * sum(sizes.values())",
        ),
        (
            "every checkpoint is of the weights alone",
            "model_only = is_last and self.config.last_save_model_only",
            "model_only = self.config.last_save_model_only",
        ),
        (
            "the last step is not saved",
            "is_turn = step == last_step or step %",
            "is_turn = step %",
        ),
        (
            "room for one checkpoint is enough",
            "needed = 2 * sum(sizes.values())",
            "needed = sum(sizes.values())",
        ),
        (
            "a tensor that ranks share counts once per rank",
            "return {name: entry for of_rank in by_rank",
            "return {f'{name}{id(of_rank)}': entry for of_rank in by_rank",
        ),
        (
            "a failed save leaves its folder",
            "            shutil.rmtree(temporary, ignore_errors=True)\n        raise\n",
            "            pass\n        raise\n",
        ),
        (
            "one checkpoint too many is kept",
            "older[self.config.keep_latest_k - 1 :]",
            "older[self.config.keep_latest_k :]",
        ),
        (
            "a failure to remove old checkpoints ends the run",
            '        except (OSError, UserError) as fault:\n            logger.warning(f"old',
            '        except ZeroDivisionError as fault:\n            logger.warning(f"old',
        ),
        (
            "the copy is not waited for before the next save",
            "        self.finish()\n        self.saved_at",
            "        self.saved_at",
        ),
        (
            "a failed save beside training is told at the next one alone",
            "if self.background is not None and self.background.has_ended(self.group):",
            "if False:",
        ),
        (
            "the run ends before the last save beside training",
            "        self.finish(must_succeed=True)\n\n",
            "\n",
        ),
        (
            "a stop ends before the save beside training",
            "            self.finish(must_succeed=True)\n            raise\n",
            "            raise\n",
        ),
        (
            "every n-th checkpoint is removed too",
            "if self.config.keep_every and step % self.config.keep_every == 0:",
            "if False:",
        ),
        (
            "the last save may fail",
            "if must_succeed or is_user_error or",
            "if is_user_error or",
        ),
    ],
    "torchtrain/checkpoint/asynchronous.py": [
        (
            "the thread that saves shares the group of the main thread",
            'patient_group("checkpoint")',
            "patient_group()",
        ),
        (
            "what is saved beside training is not a copy",
            "copied = self._stager.stage(dict(tensors), non_blocking=self._pinned)",
            "copied = dict(tensors)",
        ),
        (
            "a rank without memory for the copy ends the run, whatever on_save_error says",
            "except (MemoryError, RuntimeError) as fault:",
            "except RuntimeError as fault:",
        ),
        (
            "ranks see the end of a save apart",
            "        dist.all_reduce(state, op=dist.ReduceOp.MAX, group=group)\n",
            "",
        ),
    ],
    "torchtrain/checkpoint/commit.py": [
        (
            "the oldest checkpoint is taken",
            "return sorted(steps, reverse=True), names",
            "return sorted(steps), names",
        ),
        (
            "the rename is not synced",
            "    os.rename(temporary, target)\n    fsync_folder(target.parent)\n",
            "    os.rename(temporary, target)\n",
        ),
        (
            "a checkpoint is deleted under its name",
            "    os.rename(path, doomed)\n    fsync_folder(path.parent)\n    shutil.rmtree(doomed)\n",
            "    shutil.rmtree(path)\n",
        ),
        (
            "a deletion may come before the loss of the name",
            "    fsync_folder(path.parent)\n    shutil.rmtree(doomed)\n",
            "    shutil.rmtree(doomed)\n",
        ),
        (
            "the marker is written before the state",
            "    write_durably(temporary / STATE, state)  # which syncs the folder, so all names in it\n",
            '    write_durably(temporary / MARKER, "{}")\n    write_durably(temporary / STATE, state)\n',
        ),
        (
            "sizes are not compared",
            '        if found != record["bytes"]:\n',
            "        if found < 0:\n",
        ),
        (
            "what other ranks wrote is not looked for",
            '        if size != record["bytes"]:\n',
            "        if False:\n",
        ),
        (
            "a later format is taken for damage",
            "version > FORMAT:\n        raise UserError(",
            "version > FORMAT:\n        return str(",
        ),
        (
            "a marker may name files elsewhere",
            "        and all(Path(name).name == name for name in marker.files)\n",
            "",
        ),
        (
            "a marker of another step is taken",
            "    if step is not None and marker.step != step:\n",
            "    if False:\n",
        ),
        (
            "a number may be true",
            'model_config = ConfigDict(strict=True, extra="forbid", frozen=True)',
            'model_config = ConfigDict(extra="forbid", frozen=True)',
        ),
        (
            "the marker's step is not compared",
            "    if progress.step != marker.step:\n",
            "    if False:\n",
        ),
        (
            "an entry that nothing knows stands for another one",
            "    for name in sorted(content.keys() - known.keys()):\n",
            "    for name in ():\n",
        ),
        (
            "what is set aside takes the place of an earlier one",
            "        if not target.exists():\n            break\n",
            "        break\n",
        ),
    ],
    "torchtrain/checkpoint/state.py": [
        (
            "another precision of the states hides another model",
            'and all(name.startswith("optimizer/") for name in names)',
            "",
        ),
        (
            "buffers are exported in another precision",
            "if isinstance(weight, nn.Parameter):  # b",
            "if weight is not None:  # b",
        ),
        (
            "weights are changed by making the states",
            "            local(parameter.detach()).copy_(weight)\n",
            "",
        ),
        (
            "settings are changed by making the states",
            "            group.update(before)\n",
            '            group.update(before | {"lr": 0.0})\n',
        ),
        (
            "gradients are changed by making the states",
            "            parameter.grad = gradient\n",
            "            parameter.grad = None\n",
        ),
        ("measuring leaves states behind", "        optimizer.state.clear()\n", "        pass\n"),
        (
            "tensors of another shape are loaded",
            "        if there != here:\n",
            "        if len(there) != len(here):\n",
        ),
        ("optimizer states are converted", "converted if optimizer is not None else []", "[]"),
        ("tensors unknown to the model are passed over", "sorted(saved - everyones)", "[]"),
        (
            "tensors that are missing keep their initial values",
            '"lacks": sorted(tensors.keys() - saved)',
            '"lacks": []',
        ),
        (
            "numbers are saved in fp32",
            "torch.tensor(value, dtype=torch.float64)",
            "torch.tensor(value, dtype=torch.float32)",
        ),
    ],
    "torchtrain/checkpoint/digests.py": [
        (
            "digests are not compared",
            "if hasher.hexdigest() != records[name][digest]:",
            "if False:",
        ),
        (
            "only a file's first chunk is hashed",
            "        while chunk := file.read(2**22):\n            hasher.update(chunk)\n",
            "        hasher.update(file.read(2**22))\n",
        ),
        (
            "only the first file is reported",
            "next((fault for fault in threads.map(find, names) if fault is not None), None)",
            "next(threads.map(find, names))",
        ),
        (
            "an old checkpoint is verified by the new digest",
            "    hasher = new_hasher(file_format)",
            "    hasher = new_hasher()",
        ),
        (
            "a digest of any length is taken",
            "{{{LENGTHS[name]}}}",
            "*",
        ),
    ],
    "torchtrain/checkpoint/storage.py": [
        (
            "the probe's own time stands for the save's",
            "return (time.monotonic() - began) * size / max(part, 1)",
            "return time.monotonic() - began",
        ),
        (
            "the probe is as large as the checkpoint",
            "    part = min(size, PROBE_BYTES)\n",
            "    part = size\n",
        ),
        (
            "torch's own checksums stay switched off",
            "        set_crc32_options(before)\n",
            "        pass\n",
        ),
        (
            "files are not synced",
            "            os.fsync(self.fileno())\n        finally:",
            "            pass\n        finally:",
        ),
        (
            "any function of torch may be unpickled",
            "if is_dtype or (module, name) in self.allowed:",
            'if is_dtype or module.startswith("torch"):',
        ),
        ("an index may point to other files", "    if outside:\n", "    if False:\n"),
        (
            "an entry of raw bytes is read",
            "        if not isinstance(entry, TensorStorageMetadata):\n",
            "        if False:\n",
        ),
        (
            "slices that DCP did not write are not missed",
            "        if written != planned:\n",
            "        if written > planned:\n",
        ),
    ],
    "torchtrain/watchdog.py": [
        (
            "the first validation, which compiles, has the time of any other",
            "        is_warm = self._is_first or what in self._warm\n",
            "        is_warm = True\n",
        ),
        (
            "every validation may hang for as long as the first",
            "        self._warm.add(what)\n",
            "",
        ),
        (
            "the timeout of training is not set",
            "        if self._is_first:",
            "        if False:",
        ),
        (
            "a rank that is stopped in a save is waited for",
            "elif position.is_patient and silent_s >= self.timeout_s:",
            "elif position.is_patient and silent_s >= 100 * self.timeout_s:",
        ),
        (
            "a rank that has ended is taken for one that is stopped",
            'return 0.0 if beat == "ended" else silent_s',
            "return silent_s",
        ),
        (
            "a slow disk is taken for a hang",
            "elif not position.is_patient and waited_s >= limit_s",
            "elif waited_s >= limit_s",
        ),
        (
            "what was no hang stays the cause of a later failure",
            "        store.delete_key(HANG)\n",
            "",
        ),
        (
            "a rank that was stopped with all others blames them",
            "min(time.monotonic() - looked, self.timeout_s / 4)",
            "time.monotonic() - looked",
        ),
    ],
    "torchtrain/hangs.py": [
        (
            "ranks that find scales wait in a place without a name",
            '    "__enter__": "scales of float8 weights",\n',
            "",
        ),
        (
            "a rank that waits itself is blamed",
            "return sorted(behind - ahead or behind)",
            "return sorted(behind)",
        ),
        (
            "a rank is blamed for the counts of another group",
            "            if name in position.entered\n",
            "",
        ),
        (
            "a rank that says nothing is not missing",
            "    if silent:\n        return silent\n",
            "",
        ),
    ],
    "torchtrain/step_metrics.py": [
        (
            "a fault of a source stays on its rank",
            "            self._fault = fault\n",
            "            raise\n",
        ),
        (
            "the reduction is not part of the agreement",
            'specs = [f"{name} ({self._values[name].reduce})" for name in names]',
            "specs = list(names)",
        ),
        (
            "an unknown reduction is taken",
            '        if reduce not in ("sum", "mean", "max", "min"):\n',
            "        if False:\n",
        ),
        (
            "maximum within a rank is the last",
            "self.total = torch.maximum(self.total, term)",
            "self.total = term",
        ),
        ("the optimizer is not asked", "    candidates.append(optimizer)\n", ""),
        (
            "a mean is that of the ranks",
            "values.sum() / by_rank[:, column].sum()",
            "(values / by_rank[:, column]).mean()",
        ),
        (
            "a minimum is a maximum",
            "                results.append(values.min())\n",
            "                results.append(values.max())\n",
        ),
        ("several values of a rank are not counted", "        self.count += 1\n", ""),
        (
            "metrics of ranks that differ are mixed",
            "if FAILED in signatures or len(set(signatures)) > 1:",
            "if FAILED in signatures:",
        ),
        (
            "metrics beyond the first gather are lost",
            "            by_rank = torch.cat([by_rank, rest], dim=1)\n",
            "            by_rank = torch.cat([by_rank, 0 * rest], dim=1)\n",
        ),
        (
            "a metric's name may have no group",
            "                if not (group and slash and rest):\n",
            "                if not group:\n",
        ),
    ],
    "torchtrain/metrics.py": [
        (
            "a slice of a GPU has the peak of the whole",
            "    if MIG in device_name:\n",
            "    if False:\n",
        ),
        ("columns wrap", "            if room < 0 and shown:\n", "            if False:\n"),
        (
            "the blanks between columns are not counted",
            "            room -= 2  # between this cell and the next\n",
            "",
        ),
        (
            "added metrics stand last",
            "in (FIRST_METRICS | added | LAST_METRICS).items():",
            "in (FIRST_METRICS | LAST_METRICS | added).items():",
        ),
        (
            "the rate is printed between lines unasked",
            "        elif self.log_lr:\n",
            "        else:\n",
        ),
        (
            "another part of the name goes first",
            '    ("H100", 989e12),  # SXM: 1,979\n    ("H200 NVL"',
            '    ("H200 NVL"',
        ),
        (
            "the first step counts for the throughput",
            "        if step != self.first_step:\n",
            "        if True:\n",
        ),
        ("a window goes on over the next", "            self.window.clear()\n", ""),
        (
            "the last step is not logged",
            "is_turn = step % self.section.log_freq == 0 or step == self.total_steps\n",
            "is_turn = step % self.section.log_freq == 0\n",
        ),
        (
            "a validation is not logged between steps that are",
            "if is_turn or validated or summary.skipped:",
            "if is_turn or summary.skipped:",
        ),
        (
            "a skipped step is not logged between steps that are",
            "if is_turn or validated or summary.skipped:",
            "if is_turn or validated:",
        ),
        (
            "throughput is that of one step",
            "self.tokens_per_step * len(steps) / total_time",
            "self.tokens_per_step / total_time",
        ),
        (
            "the slowest rank is that of one step",
            "totals = [sum(of_rank) for of_rank in zip(*own_times_s, strict=True)]",
            "totals = list(own_times_s[-1])",
        ),
        (
            "the excess is over the mean of the ranks",
            "most - statistics.median_low(totals)",
            "most - statistics.mean(totals)",
        ),
        (
            "what runs while data is read counts twice",
            "        self._ran_before_s += measure_running() - ran_s\n",
            "",
        ),
        (
            "time in which a rank waits for its data is not its own",
            "return self.data_time_s + measure_running() - self._ran_before_s",
            "return measure_running() - self._ran_before_s",
        ),
        (
            "data time is a share, not per cent",
            "100 * data_time / total_time",
            "data_time / total_time",
        ),
        ("the step's time is that of the window", "total_time / len(steps),", "total_time,"),
        ("memory is in decimal gigabytes", "GIB = 2**30", "GIB = 10**9"),
        (
            "memory is in KiB taken for bytes",
            'unit = 1 if sys.platform == "darwin" else 1024',
            "unit = 1",
        ),
        (
            "a metric that is not finite breaks the JSON",
            "None if value is not None and not math.isfinite(value) else value",
            "value",
        ),
        (
            "the remaining time counts all steps",
            '(self.total_steps - record["step"]) * record["step_time_s"]',
            'self.total_steps * record["step_time_s"]',
        ),
        ("a given peak is in FLOP/s", "return given_tflops * 1e12", "return given_tflops"),
        (
            "a pause counts",
            "        self.step_started += time.perf_counter() - started\n",
            "        pass\n",
        ),
        (
            "waiting is not added up",
            "        self.data_time_s += time.perf_counter() - started\n",
            "        self.data_time_s = time.perf_counter() - started\n",
        ),
    ],
    "torchtrain/needs.py": [
        (
            "a missing compiler is found in the first step",
            "        check_compilers(config, device)\n",
            "",
        ),
        (
            "a folder that cannot be made is found when it is written",
            "            check_folders(config)\n",
            "",
        ),
        (
            "what the metrics need is found when they are opened",
            "            check_packages(config.metrics)\n",
            "",
        ),
    ],
    "torchtrain/log_files.py": [
        ("TensorBoard doubles back on resume", "purge_step=first_step", "purge_step=None"),
        ("a half line stays", "            file.truncate(size)\n", ""),
        (
            "lines that waited are lost",
            "        self.waiting += lines\n",
            "        self.waiting = [*lines]\n",
        ),
        (
            "what waits at the end is not tried again",
            "        if self.waiting:\n            self.append(())\n        if self.waiting:\n            lost",
            "        if self.waiting:\n            lost",
        ),
        (
            "what is logged is not synced",
            "                os.fsync(file.fileno())\n",
            "                pass\n",
        ),
    ],
    "torchtrain/run_folder.py": [
        (
            "an absolute output is moved",
            " for output in outputs if not output.is_absolute()}",
            " for output in outputs}",
        ),
        (
            "the holder is not named",
            'f"process {os.getpid()} on {socket.gethostname()}".encode()',
            'b""',
        ),
        (
            "two runs may share a folder",
            "fcntl.LOCK_EX | fcntl.LOCK_NB",
            "fcntl.LOCK_SH | fcntl.LOCK_NB",
        ),
        (
            "the resumed step's own line is moved",
            "if _logged_step(line) <= step:",
            "if _logged_step(line) < step:",
        ),
        ("a torn line stays", '        return float("inf")\n', "        return 0.0\n"),
        (
            "earlier outputs go to a folder that is taken",
            "newest = max((int(number) for number in numbers if number.isdigit()), default=0)",
            "newest = int(numbers[-1]) if numbers else 0",
        ),
        (
            "earlier superseded lines stay",
            "names = {*LOGS.keys(), *LOGS.values(), *DESCRIPTION_FILES",
            "names = {*LOGS.keys(), *DESCRIPTION_FILES",
        ),
        (
            "superseded lines are overwritten",
            "        _append_durably(superseded, moved)\n",
            "        superseded.unlink(missing_ok=True)\n        _append_durably(superseded, moved)\n",
        ),
        (
            "lines that were half moved come twice",
            "                        file.truncate(int(",
            "                        (int(",
        ),
        (
            "temporary files are left for ever",
            "            remove_unfinished(self.path / name)\n        for",
            "            pass\n        for",
        ),
    ],
    "torchtrain/profiling.py": [
        (
            "a full disk ends the run for want of a trace",
            "    except OSError as fault:\n        remove_if_possible(file)",
            "    except KeyError as fault:\n        remove_if_possible(file)",
        ),
        (
            "half a trace is left",
            "        remove_if_possible(file)  # a part of it would be taken for the whole\n",
            "",
        ),
        (
            "each collection is of everything",
            "            gc.collect(1)\n",
            "            gc.collect(2)\n",
        ),
        ("Python collects garbage when it likes", "        gc.disable()\n", ""),
        (
            "a memory snapshot is written at each step",
            "and step % self.config.profile_freq == 0:",
            "and True:",
        ),
        ("garbage is collected at every step", "elif step % self.every == 0:", "else:"),
    ],
    "torchtrain/logging_utils.py": [
        (
            "errors go to stdout",
            "    errors = _Handler(sys.stderr,",
            "    errors = _Handler(sys.stdout,",
        ),
        (
            "errors are said twice",
            "    ordinary.addFilter(lambda record: record.levelno < logging.ERROR)\n",
            "",
        ),
        (
            "progress stays before a line",
            "        clear_progress()\n        super",
            "        super",
        ),
        (
            "the prefix is not counted",
            "    return columns - max(map(len, prefixes), default=0)",
            "    return columns",
        ),
    ],
    "torchtrain/launch_variables.py": [
        (
            "a lone process with WORLD_SIZE=1 looks for a store",
            "    return OF_TORCHRUN in variables and all(",
            "    return all(",
        ),
        (
            "what torchrun has left in part is taken for its store",
            'OF_TORCHRUN in variables and all(name in variables for name in ("WORLD_SIZE", *MEETING))',
            "OF_TORCHRUN in variables",
        ),
        (
            "an empty address counts as given",
            "if not variables.get(name)]",
            "if name not in variables]",
        ),
        (
            "a rank may be the world size",
            "default=0, least=0) >= world_size:",
            "default=0, least=0) > world_size:",
        ),
    ],
    "torchtrain/attempts.py": [
        (
            "a rank waits for ever for a program that never answers",
            "    return not futures.wait([probe], ANSWER_S).done\n",
            "    return False\n",
        ),
        (
            "a port where nobody listens yet is another program's",
            "    except OSError:\n        return False\n",
            "    except OSError:\n        return True\n",
        ),
        (
            "an attempt finds the addresses of the dead",
            'dist.PrefixStore(f"attempt-{name_attempt()}", store)',
            'dist.PrefixStore("attempt", store)',
        ),
        (
            "what ended for good is tried again",
            "    if store.check([ENDED]):",
            "    if False:",
        ),
        (
            "a change of nodes is a user's stop",
            "of_attempt(store).check([CHANGE])",
            "False",
        ),
        (
            "a user error of an earlier attempt is a crash",
            "fault.is_user_error = status == 2",
            "fault.is_user_error = False",
        ),
        (
            "the step that was not finished counts as taken again",
            "store.get(STEP).split()[1]) - 1 - done)",
            "store.get(STEP).split()[1]) - done)",
        ),
        (
            "a step is taken for the first attempt's",
            'f"{name_attempt()} {step}"',
            'f"0 {step}"',
        ),
    ],
    "torchtrain/orphans.py": [
        (
            "a tool whose rank died first lives on",
            "    if os.getppid() != int(os.environ[STARTED_BY]):",
            "    if False:",
        ),
        (
            "ranks outlive their launcher",
            "prctl(set_parent_death_signal, signal.SIGKILL)",
            "prctl(set_parent_death_signal, 0)",
        ),
        (
            "a rank whose launcher died first lives on",
            "    if _is_orphan():",
            "    if False:",
        ),
    ],
    "torchtrain/open_files.py": [
        (
            "the hard limit is taken whatever is needed",
            "else min(wanted, hard)",
            "else hard",
        ),
        (
            "nobody hears that the hard limit may be too low",
            "    if allowed == wanted:\n",
            "    if allowed:\n",
        ),
    ],
    "torchtrain/ranks.py": [
        (
            "a rank on a CPU waits for ranks on GPUs",
            "    require_one_type(device)\n",
            "",
        ),
        (
            "the ranks' rows are mixed up",
            "    return rows.view(ranks, len(row))\n",
            "    return rows.view(len(row), ranks).T\n",
        ),
        (
            "each caller has a patient group of its own",
            "        if group.group_desc == name:\n",
            "        if group is None:\n",
        ),
        (
            "every rank of a node says that it may open too few files",
            '        if os.environ.get("LOCAL_RANK", "0") == "0":\n            raise\n',
            "        if fault:\n            raise\n",
        ),
        (
            "the timeout reaches the group of all ranks alone",
            "    for group in dist.distributed_c10d._world.pg_map:\n        if not",
            "    for group in [dist.group.WORLD]:\n        if not",
        ),
        (
            "what waits for a disk gets the timeout of training",
            "        if not group.group_desc.startswith(PATIENT):\n",
            "        if group:\n",
        ),
        (
            "only the first key that differs is named",
            "        if len(set(given)) > 1:\n",
            "        if len(set(given)) > 1 and len(lines) < 2:\n",
        ),
        (
            "a key that may differ is compared",
            '            if f"{section}.{key}" not in may_differ:\n',
            "            if True:\n",
        ),
        (
            "the highest failing rank speaks",
            "lowest = next(rank for rank, theirs in enumerate(by_rank) if theirs is not None)",
            "lowest = max(rank for rank, theirs in enumerate(by_rank) if theirs is not None)",
        ),
        (
            "all ranks of a node prepare the data at once",
            "    early = together(lambda: action() if is_first else None, group)\n",
            "    early = action()\n",
        ),
        (
            "ranks that see different corpora train on",
            "        if theirs != first:\n",
            "        if False:\n",
        ),
        (
            "a rank's fault stays its own",
            "dist.all_reduce(failed, group=group)",
            "dist.barrier(group=group)",
        ),
        (
            "a user's fault on another rank is a crash",
            "peer_fault.is_user_error = isinstance(fault, UserError)",
            "peer_fault.is_user_error = False",
        ),
        (
            "the timeout of training is that of the start",
            "        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)\n",
            "        pass\n",
        ),
    ],
    "torchtrain/utils.py": [
        (
            "a new folder's name is not synced",
            "    for path in new:",
            "    for path in []:",
        ),
    ],
    "torchtrain/tools/faults/replay.py": [
        (
            "an unsynced name survives a power cut",
            'states = {"synced": entry.history[0], "names": entry.history[-1]}',
            'states = {"synced": entry.history[-1], "names": entry.history[-1]}',
        ),
        (
            "unsynced content survives a power cut",
            'is_whole = keep == "some" and rng.random() < 0.5',
            'is_whole = keep != "synced" or rng.random() < 0.5',
        ),
        (
            "a rename is not lost by a power cut",
            "        there.names[target.name] = entry\n        folder.change()\n",
            "        there.names[target.name] = entry\n        self._sync(folder)\n",
        ),
    ],
    "torchtrain/tools/faults/trial.py": [
        (
            "a start may go on from any checkpoint",
            "    if found is not None and found not in allowed:",
            "    if found is not None and not allowed:",
        ),
        (
            "a beginning at step 1 is no loss",
            "        found = 0\n",
            "        found = None\n",
        ),
    ],
    "torchtrain/tools/faults/bench.py": [
        (
            "losses are compared to rounding",
            "            if ours != expected:",
            '            if abs(ours["loss"] - expected["loss"]) > 1e-9:',
        ),
    ],
}
