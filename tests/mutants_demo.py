"""Mutants of the demo: sessions, queue, limits, uploads, recipes, forms."""

from __future__ import annotations

from mutant import Mutant

HOST = "tests/test_demo_host.py::"
ABSURD = f"{HOST}test_what_is_absurd_is_refused_before_it_is_queued"
UPLOADS = f"{HOST}test_uploads_are_judged_by_what_they_hold"
RECIPES = f"{HOST}test_recipes_from_anywhere_reach_no_further_than_the_form"
OWN = f"{HOST}test_sessions_that_share_the_engine_get_their_own_results"
CANCEL = f"{HOST}test_cancel_stops_a_sessions_own_runs_at_their_best_so_far"
LEAVE = f"{HOST}test_who_leaves_takes_runs_and_files_along"
BUTTONS = f"{HOST}test_start_comes_back_however_a_run_ends"
MIDRUN = f"{HOST}test_a_press_in_mid_run_starts_nothing_and_a_form_drawn_anew_waits"
BROWSER = "tests/test_demo_browser.py::"
RETURN = f"{BROWSER}test_replay_and_score_come_back_after_an_end_and_an_error"
FULL = f"{HOST}test_a_full_queue_and_a_greedy_session_are_told_so"

MUTANTS = (
    Mutant(
        "demo: the results of another session",
        "apps/demo_session.py",
        "ticket.results.append(self._write(ticket, result))",
        "list(self._running.values())[-1].results.append(self._write(ticket, result))",
        (OWN,),
    ),
    Mutant(
        "demo: all prompts are the first",
        "apps/demo_engine.py",
        'cond=self._condition(prompt or "")',
        "cond=0",
        (OWN,),
    ),
    Mutant(
        "demo: one folder for all sessions",
        "apps/demo_session.py",
        'return self.root / "sessions" / safe',
        'return self.root / "sessions" / "nobody"',
        (OWN,),
    ),
    Mutant(
        "demo: cancel is ignored",
        "apps/demo_session.py",
        "return ticket.cancel.is_set() or self._closing\n\n    def _ended",
        "return self._closing\n\n    def _ended",
        (CANCEL,),
    ),
    Mutant(
        "demo: all people are one",
        "apps/demo_api.py",
        'return getattr(request, "session_hash", None) or "nobody"',
        'return "nobody"',
        ("tests/test_demo.py::test_cancel_stops_the_callers_runs_only",),
    ),
    Mutant(
        "demo: cancel stops everybody",
        "apps/demo_session.py",
        "going = [t for t in self.tickets(session) if not t.over]",
        "going = [t for s in list(self._tickets) for t in self.tickets(s) if not t.over]",
        (CANCEL,),
    ),
    Mutant(
        "demo: a stopped run is repeated as if it were whole",
        "apps/demo_order.py",
        'if recipe.engine.get("stopped"):',
        'if recipe.engine.get("halted"):',
        (CANCEL,),
    ),
    Mutant(
        "demo: a closed tab runs on",
        "apps/demo_session.py",
        "            ticket.left = True\n        self.cancel(session)",
        "            ticket.left = True",
        (LEAVE,),
    ),
    Mutant(
        "demo: files are written for who has left",
        "apps/demo_session.py",
        "            ticket.left = True\n",
        "            ticket.left = False\n",
        (LEAVE,),
    ),
    Mutant(
        "demo: nobody needs to look",
        "apps/demo_session.py",
        "> _UNWATCHED and",
        "> 2 * _UNWATCHED + 60 and",
        (f"{HOST}test_a_run_that_nobody_looks_at_stops",),
    ),
    Mutant(
        "demo: names of sessions are paths",
        "apps/demo_session.py",
        '"".join(c for c in session if c.isalnum())[:40] or "nobody"',
        "session",
        (f"{HOST}test_a_session_lives_in_its_own_folder_whatever_its_name",),
    ),
    Mutant(
        "demo: first come, first served",
        "apps/demo_queue.py",
        "self._waiting.move_to_end(ticket.session)",
        "self._waiting.move_to_end(ticket.session, last=False)",
        (f"{HOST}test_sessions_take_turns",),
    ),
    Mutant(
        "demo: the queue has no end",
        "apps/demo_session.py",
        "if len(self._queue) >= limits.waiting:",
        "if len(self._queue) > limits.waiting:",
        (FULL,),
    ),
    Mutant(
        "demo: a session may ask for ever more",
        "apps/demo_session.py",
        "if len(mine) >= limits.per_session:",
        "if len(mine) > limits.per_session:",
        (FULL,),
    ),
    Mutant(
        "demo: no limit of time",
        "apps/demo_order.py",
        "budget=Budget(nfe=count, seconds=limits.seconds)",
        "budget=Budget(nfe=count)",
        (f"{HOST}test_the_limit_of_time_ends_a_run_with_its_best_and_says_so",),
    ),
    Mutant(
        "demo: any model may be named",
        "apps/demo_order.py",
        "if model not in self.models and not self.any_model:",
        "if model not in self.models and self.any_model:",
        (f"{ABSURD}[model]", f"{RECIPES}[model]"),
    ),
    Mutant(
        "demo: any population",
        "apps/demo_order.py",
        'for option in ("n_particles", "n"):',
        'for option in ("n_particles",):',
        (f"{ABSURD}[samples]",),
    ),
    Mutant(
        "demo: any number of steps",
        "apps/demo_order.py",
        "low, high = ranges[name]",
        'low, high = ranges[name][0], 1e9 if name == "num_inference_steps" else ranges[name][1]',
        (f"{ABSURD}[steps]",),
    ),
    Mutant(
        "demo: the guide is its own judge",
        "apps/demo_order.py",
        "if both := sorted(set(weights) & set(heldout)):",
        "if both := sorted(set(weights) & set()):",
        (f"{ABSURD}[judge and party]",),
    ),
    Mutant(
        "demo: uploads are believed",
        "apps/demo_actions.py",
        "OSError, ValueError, SyntaxError) as error:",
        "OSError, ValueError, SyntaxError) as error:\n        return file",
        (f"{UPLOADS}[text]",),
    ),
    Mutant(
        "demo: any kind of picture",
        "apps/demo_actions.py",
        "with Image.open(file, formats=_FORMATS) as image:",
        "with Image.open(file) as image:",
        (f"{UPLOADS}[gif]",),
    ),
    Mutant(
        "demo: pictures are not read to their end",
        "apps/demo_actions.py",
        "            image.load()\n",
        "            image.tell()\n",
        (f"{UPLOADS}[damaged]",),
    ),
    Mutant(
        "demo: uploads of any size",
        "apps/demo_actions.py",
        "if file.stat().st_size > limits.upload_bytes:",
        "if file.stat().st_size > 100 * limits.upload_bytes:",
        (f"{UPLOADS}[50 MB]",),
    ),
    Mutant(
        "demo: pictures of any size",
        "apps/demo_actions.py",
        "if wide * high > limits.upload_pixels:",
        "if max(wide, high) > limits.upload_pixels:",
        (f"{UPLOADS}[large]",),
    ),
    Mutant(
        "demo: recipes may name files and addresses",
        "apps/demo_order.py",
        'any(w in ("url", "model", "head") for w in words)',
        'any(w in ("code",) for w in words)',
        (f"{RECIPES}[file]",),
    ),
    Mutant(
        "demo: recipes may name rewards that are not offered",
        "apps/demo_order.py",
        "if name in REWARDS.names() and name not in self.rewards:",
        "if name not in REWARDS.names() and name in self.rewards:",
        (f"{RECIPES}[not offered]",),
    ),
    Mutant(
        "demo: every repeat is identical",
        "apps/demo_actions.py",
        "if difference == 0:",
        "if difference < 256:",
        (f"{HOST}test_an_edited_picture_is_told_from_its_repeat",),
    ),
    Mutant(
        "demo: texts of people are HTML",
        "apps/demo_views.py",
        'class="st-note st-{kind}">{html.escape(text)}</div>',
        'class="st-note st-{kind}">{text}</div>',
        (f"{HOST}test_texts_of_people_stay_text",),
    ),
    Mutant(
        "demo: a model that cannot be opened ends the worker",
        "apps/demo_session.py",
        "            self._fail(ticket, error)\n            for other",
        "            raise\n            for other",
        (f"{HOST}test_a_model_folder_that_vanishes_is_a_message_and_a_log_line",),
    ),
    Mutant(
        "demo: empty numbers are nothing",
        "apps/demo_forms.py",
        'return self.kind in ("whole", "number") and self.optional',
        "return False",
        (f"{HOST}test_numbers_that_may_be_left_out_are_written_as_text",),
    ),
    Mutant(
        "demo: Steer never comes back",
        "apps/demo_buttons.py",
        "        yield self.states(busy=False)\n",
        "        yield self.states(busy=True)\n",
        (BUTTONS,),
    ),
    Mutant(
        "demo: Steer stays out of use after an error",
        "apps/demo_buttons.py",
        "            yield {status: views.message(refusal(error), wrong=True)}\n",
        "            yield {status: views.message(refusal(error), wrong=True)}\n"
        "            return\n",
        (BUTTONS,),
    ),
    Mutant(
        "demo: a press in mid-run starts another",
        "apps/demo_buttons.py",
        "        if session in self.going:",
        "        if not session:",
        (MIDRUN,),
    ),
    Mutant(
        "demo: the second press of a session is the last",
        "apps/demo_buttons.py",
        "self.going.discard(session)",
        "self.going.add(session)",
        (BUTTONS,),
    ),
    Mutant(
        "demo: a form drawn anew gives Steer back in mid-run",
        "apps/demo_buttons.py",
        "while session_of(request) in self.going:",
        "while session_of(request) is None:",
        (MIDRUN,),
    ),
    Mutant(
        "demo: the other tabs' buttons never come back",
        "apps/demo_buttons.py",
        "event.then(None, None, self.listed(), js=self._script(busy=False), **_QUIET)",
        "pass",
        (RETURN,),
    ),
    Mutant(
        "demo: an error keeps the other tabs' buttons",
        "apps/demo_buttons.py",
        "event.failure(None, None, self.listed(), js=self._script(busy=False), **_QUIET)",
        "pass",
        (RETURN,),
    ),
    Mutant(
        "demo: the best of a stopped comparison is unsteered",
        "apps/demo_page.py",
        'if name == "best_of_n" and whole:',
        'if name == "best_of_n":',
        (f"{BROWSER}test_compare_comes_back_after_a_cancel_and_wrong_input",),
    ),
)
