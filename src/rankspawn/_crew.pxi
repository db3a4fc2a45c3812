cdef struct _number:
    # A variable whose value is a number that grows with the rank.
    char *name
    size_t size, place
    uint64_t first


cdef class Crew:
    """Ranks that one call starts by several threads: add() each, then run(). Any thread may call started().

    They begin with fresh signals (see spawn()).

    Args:
        count: how many ranks add() will be called for, at most.
        env: the environment that they inherit, a mapping, or None for the caller's.
        shared: further variables, a mapping of text. They replace inherited variables of the same names.
        numbered: variables whose value is a number that grows with the rank: name -> the first rank's number. They
            replace other variables.
        cwd, new_session, death_signal, cgroup_fd, guard_fd: as spawn() takes them; -1 for no cgroup or no guard.
    """

    cdef _Arena arena
    cdef spawn_request common
    cdef spawn_request *requests
    cdef spawn_crew crew
    cdef char **envp  # the shared environment, with `variables` entries
    cdef size_t room, variables, numbers_count
    cdef _number *numbers
    cdef dict places, masks
    cdef list owners
    cdef object argv, executables  # the ones encoded last

    def __cinit__(
        self, size_t count, env, shared, numbered, cwd, bint new_session, int death_signal, int cgroup_fd, int guard_fd
    ):
        self.arena = _Arena()
        self.owners = []
        self.places = {}
        self.masks = {}
        self.room = count
        self.requests = <spawn_request *>self.arena.take(count * sizeof(spawn_request))
        self.crew.requests = self.requests
        self.crew.results = <spawn_result *>self.arena.take(count * sizeof(spawn_result))
        self.crew.outcomes = <atomic_int *>self.arena.take(count * sizeof(atomic_int))
        self.envp = self.arena.environment(env, &self.variables)
        self.share(shared, numbered)
        _set_common(self.arena, &self.common, cwd, new_session, death_signal, cgroup_fd, True)
        self.common.guard_fd = guard_fd

    cdef int share(self, shared, numbered) except -1:
        """Merge the shared variables into the inherited ones, and reserve places for the numbered ones."""
        cdef list pairs = list(shared.items()), counted = list(numbered.items())
        cdef size_t room = self.variables + len(pairs) + len(counted)
        cdef const char *name_data
        cdef _number *number
        inherited, self.envp = self.envp, <char **>self.arena.take((room + 1) * sizeof(char *))
        memcpy(self.envp, inherited, self.variables * sizeof(char *))
        for name, value in pairs:
            self.settle(name, self.arena.pair(name, value))
        self.numbers = <_number *>self.arena.take(len(counted) * sizeof(_number))
        for name, first in counted:
            number = &self.numbers[self.numbers_count]
            number.name = self.arena.pair(name, "")
            _held = _encoded(name, &name_data, &number.size)
            number.first = first
            number.place = self.settle(name, number.name)
            self.numbers_count += 1
        self.envp[self.variables] = NULL
        self.common.envp = self.envp
        return 0

    cdef size_t settle(self, object name, char *pair) except? 0:
        """Add ``pair`` for all ranks, or replace the variable of its name. Return its place."""
        cdef Py_ssize_t place = environment_index(self.envp, self.variables, pair)
        if place < 0:
            place = self.variables
            self.variables += 1
        self.envp[place] = pair
        self.places[name] = place
        return place

    def add(
        self, owner, argv, executables, env, streams, bytes cpu_mask, int mem_mode, bytes node_mask,
        bint binding_required,
    ):
        """Add the next rank. The arguments are those of spawn(), except ``env``.

        Args:
            env: the rank's own variables, a mapping of text. They replace shared variables of the same names.

        Raises:
            IndexError: there are ``count`` ranks already.
            TypeError, ValueError: an argument cannot be encoded.
        """
        cdef size_t rank = self.crew.count
        cdef spawn_request *request = &self.requests[rank]
        if rank == self.room:
            raise IndexError("more ranks than there is room for")
        if argv is not self.argv:
            self.common.argv = self.arena.texts(argv)
            self.argv = argv
        if executables is not self.executables:
            self.common.executables = <const char **>self.arena.texts(executables)
            self.executables = executables
        request[0] = self.common
        if env or self.numbers_count:
            request.envp = self.with_own(env)
        _set_own(self.arena, request, streams, self.kept(cpu_mask), mem_mode, self.kept(node_mask), binding_required)
        self.crew.outcomes[rank] = SPAWN_NOT_TRIED
        self.owners.append(owner)
        self.crew.count += 1

    cdef bytes kept(self, bytes mask):
        """The first mask that was equal to ``mask``, because crew.c compares the masks of ranks as pointers."""
        return None if mask is None else <bytes>self.masks.setdefault(mask, mask)

    cdef char **with_own(self, env) except NULL:
        cdef size_t i, count = self.variables, room = count + len(env)
        cdef _number *number
        taken = <char **>self.arena.take((room + 1) * sizeof(char *))
        memcpy(taken, self.envp, count * sizeof(char *))
        for i in range(self.numbers_count):
            number = &self.numbers[i]
            taken[number.place] = <char *>self.arena.take(number.size + ENVIRONMENT_NUMBER_ROOM)
            environment_number(taken[number.place], number.name, number.size, number.first + self.crew.count)
        for name, value in env.items():
            pair = self.arena.pair(name, value)
            place = self.places.get(name)
            if place is None:
                place = self.places[name] = environment_index(self.envp, self.variables, pair)
            if place >= 0:
                taken[<size_t>place] = pair
            elif count == room:
                raise RuntimeError("the environment changed size while it was read")
            else:
                taken[count] = pair
                count += 1
        taken[count] = NULL
        return taken

    def run(self, spawn_mechanism mechanism, str name, unsigned int workers):
        """Start the ranks that have not started yet, and give each process to its owner, as spawn() does.

        Args:
            mechanism: CLONE or POSIX_SPAWN.
            name: the mechanism's name, for the attribute ``mechanism`` of each started owner.
            workers: how many threads start ranks; the calling thread may be one of them.

        Returns:
            (rank, what spawn() returns) for each tried rank whose result is not ALL_DONE, in the order of ranks. After
            the first failure no other start begins.
        """
        cdef size_t rank
        self.crew.mechanism = mechanism
        self.crew.workers = workers
        with nogil:
            c_spawn_many(&self.crew)
        said = []
        for rank in range(self.crew.count):
            owner = self.owners[rank]
            if owner is None or self.crew.outcomes[rank] == SPAWN_NOT_TRIED:
                continue
            told = _told(owner, &self.crew.results[rank], self.crew.outcomes[rank])
            if told is not ALL_DONE:
                said.append((rank, told))
            if self.crew.outcomes[rank] == SPAWN_STARTED:
                owner.mechanism = name
                self.owners[rank] = None
        return said

    def started(self):
        """How many ranks have started so far. Any thread may call this during run()."""
        return spawn_many_started(&self.crew)
