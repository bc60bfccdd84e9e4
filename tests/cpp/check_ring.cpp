// Check of sm90/instructions/ring.cuh, and of the order in which the sm90 forward's producer and consumers walk its rings: random
// interleavings of one producer warp, TMA and the consumers' warps.  Of a tile's key blocks each group sees a range of its own, and
// passes over the others.  Wrong are a deadlock, a buffer that is written while somebody reads it or another load is under way to it, and a
// read of anything but the use that is meant.  Faults that are put in must be found.
#include <string>
#include <vector>

#include "check.h"
#include "interleave.h"
#include "sm90/instructions/ring.cuh"

using namespace flash;
using namespace flash::sm90;
using namespace interleave;
using check::expect;

// What a simulation can be told to do wrong.
enum class Fault {
  kNone,
  kNoFullWait,
  kNoEmptyWait,
  kFewReleases,
  kEarlyRelease,
  kSameParity,
  kNoPassWait,      // stages that pass by are released before they are full
  kShortPassRight,  // one stage too few before the blocks that a group sees
  kShortPassLeft    // one stage too few behind them
};

// --- One ring ---------------------------------------------------------------------------------------

template <int kSize>
std::string run_ring(int uses, int consumers, Fault fault, Random& draw) {
  Machine machine(1 + consumers, draw);
  std::vector<Buffer> buffers(kSize);
  bool const few = fault == Fault::kFewReleases;
  std::vector<Barrier> full(kSize, Barrier(1)), empty(kSize, Barrier(consumers - few));
  RingPlace<kSize> ring{};
  for (int use = 0; use < uses; ++use) {
    auto const place = ring.take();
    machine.agents[0].add([&, place] {
      uint32_t const parity = fault == Fault::kSameParity ? 1 : place.empty_parity();
      return fault == Fault::kNoEmptyWait || empty[place.index].passes(parity);
    });
    machine.agents[0].add_once(
        [&, place, use] { machine.load(buffers[place.index], use, full[place.index]); });
    for (int c = 1; c <= consumers; ++c) {
      Agent& consumer = machine.agents[c];
      consumer.add([&, place] {
        return fault == Fault::kNoFullWait || full[place.index].passes(place.full_parity());
      });
      auto const begin   = [&, place, use] { machine.begin_read(buffers[place.index], use); };
      auto const end     = [&, place, use] { machine.end_read(buffers[place.index], use); };
      auto const release = [&, place] { empty[place.index].arrive(); };
      consumer.add_once(begin);
      if (fault == Fault::kEarlyRelease) { consumer.add_once(release), consumer.add_once(end); }
      if (fault != Fault::kEarlyRelease) { consumer.add_once(end), consumer.add_once(release); }
    }
  }
  machine.run();
  return machine.wrong;
}

template <int kSize>
void check_ring(Random& draw) {
  for (int consumers : {2, 3}) {
    for (int i = 0; i < 3; ++i) {
      auto const wrong = run_ring<kSize>(2000, consumers, Fault::kNone, draw);
      expect(wrong.empty(), "ring of %d, %d consumers: %s", kSize, consumers, wrong.c_str());
    }
    for (Fault fault : {Fault::kNoFullWait, Fault::kNoEmptyWait, Fault::kFewReleases,
                        Fault::kEarlyRelease, Fault::kSameParity}) {
      bool found = false;
      for (int i = 0; i < 50 && !found; ++i) {
        found = !run_ring<kSize>(100, consumers, fault, draw).empty();
      }
      expect(found, "ring of %d, %d consumers: fault %d is not found", kSize, consumers,
             int(fault));
    }
  }
}

// --- The forward's three rings ----------------------------------------------------------------------

constexpr int kWarps = 4, kJobs = 4,
              kEnd = -2;  // warps of a group; jobs; the job that says that there are no more

enum class Matrix { kQ, kK, kV, kO };
int name_of(Matrix matrix, int tile, int block = 0) {
  return (tile * 64 + block) * 4 + int(matrix);
}

// The key blocks that a group sees, from first to end.
struct Seen {
  int first, end;
};
struct Tile {
  int blocks;
  std::vector<Seen> seen;  // by each group
};

template <int kStages, int kQBuffers>
class Forward {
 public:
  Forward(std::vector<Tile> tiles_, int groups_, Fault fault_, Random& draw)
      : machine(1 + groups_ * kWarps, draw),
        tiles(std::move(tiles_)),
        groups(groups_),
        fault(fault_) {
    int const warps = groups * kWarps;
    for (int b = 0; b < kQBuffers; ++b) {
      q.emplace_back(groups), q_full.emplace_back(groups), q_empty.emplace_back(groups);
    }
    stage_empty.assign(kStages, Barrier(warps - (fault == Fault::kFewReleases)));
    job_empty.assign(kJobs, Barrier(warps)), group_barriers.assign(groups, Barrier(kWarps));
    plan_producer(machine.agents[0], draw);
    for (int w = 0; w < warps; ++w) { consumers.push_back({w / kWarps, w % kWarps}); }
    for (int w = 0; w < warps; ++w) {
      machine.agents[1 + w].refill = [this, w] {
        return plan_tile(machine.agents[1 + w], consumers[w]);
      };
    }
  }

  std::string run() {
    machine.run();
    for (int stored : outputs) {
      if (machine.wrong.empty() && stored != groups) {
        machine.fail("an output is not stored once");
      }
    }
    return machine.wrong;
  }

 private:
  struct Warp {
    int group, number;
    RingPlace<kQBuffers> q_ring{};
    RingPlace<kStages> stage_ring{};
    RingPlace<kJobs> job_ring{};
    RingPlace<kJobs> job{};
    int stored_from = -1, tile = 0;
    bool has_job = false, at_end = false;
    uint32_t group_parity = 0;
  };

  Machine machine;
  std::vector<Tile> tiles;
  int groups;
  Fault fault;
  std::vector<Buffer> stages{kStages}, jobs{kJobs};
  std::vector<std::vector<Buffer>> q;
  std::vector<std::vector<Barrier>> q_full, q_empty;
  std::vector<Barrier> stage_full{kStages}, stage_empty, job_full{kJobs}, job_empty, group_barriers;
  Barrier landed{1};
  uint32_t landed_parity = 0;
  std::vector<Warp> consumers;
  std::vector<int> outputs = std::vector<int>(tiles.size(), 0), stores = std::vector<int>(3, 0);

  // As producer.cuh.
  void plan_producer(Agent& agent, Random& draw) {
    RingPlace<kQBuffers> q_ring{};
    RingPlace<kStages> stage_ring{};
    RingPlace<kJobs> job_ring{};
    auto const publish = [&](int content) {
      auto const place = job_ring.take();
      agent.add([this, place] { return job_empty[place.index].passes(place.empty_parity()); });
      agent.add_once([this, place, content] {
        machine.begin_write(jobs[place.index]), machine.end_write(jobs[place.index], content);
        job_full[place.index].arrive();
      });
    };
    auto const load_stage = [&](int content) {
      auto const place = stage_ring.take();
      agent.add([this, place] {
        return fault == Fault::kNoEmptyWait ||
               stage_empty[place.index].passes(place.empty_parity());
      });
      bool const changes = content % 4 == int(Matrix::kV) && below(draw, 2);
      load(agent, stages[place.index], content, stage_full[place.index], changes);
    };
    for (int tile = 0; tile < int(tiles.size()); ++tile) {
      publish(tile);
      auto const place  = q_ring.take();
      int const last    = tiles[tile].blocks - 1;
      auto const load_q = [&](int group) {
        agent.add([this, place, group] {
          return q_empty[place.index][group].passes(place.empty_parity());
        });
        load(agent, q[place.index][group], name_of(Matrix::kQ, tile), q_full[place.index][group],
             below(draw, 3) == 0);
      };
      load_q(0);
      if (last >= 0) { load_stage(name_of(Matrix::kK, tile, last)); }
      for (int group = 1; group < groups; ++group) { load_q(group); }
      for (int block = last; block > 0; --block) {
        load_stage(name_of(Matrix::kK, tile, block - 1));
        load_stage(name_of(Matrix::kV, tile, block));
      }
      if (last >= 0) { load_stage(name_of(Matrix::kV, tile, 0)); }
    }
    publish(kEnd);
  }

  // By TMA.  A tile with foreign rows the producer changes before it passes it on.
  void load(Agent& agent, Buffer& buffer, int content, Barrier& full, bool changes) {
    Barrier& first = changes ? landed : full;
    agent.add_once([this, &buffer, content, &first] { machine.load(buffer, content, first); });
    if (!changes) { return; }
    agent.add([this, parity = landed_parity] { return landed.passes(parity); });
    agent.add_once([this, &buffer, content] {
      machine.begin_write(buffer), machine.end_write(buffer, content);
    });
    agent.add_once([&full] { full.arrive(); });
    landed_parity ^= 1;
  }

  // As consumer.cuh: the actions of one tile, when its job is there.
  bool plan_tile(Agent& agent, Warp& warp) {
    if (warp.at_end) { return false; }
    if (!warp.has_job) {
      warp.job = warp.job_ring.take(), warp.has_job = true;
      agent.add([this, &warp] { return job_full[warp.job.index].passes(warp.job.full_parity()); });
      return true;
    }
    warp.has_job  = false;
    int const job = warp.job.index, tile = jobs[job].content;
    if (tile == kEnd) {
      warp.at_end = true;
      return release(agent, warp), true;
    }
    auto const place = warp.q_ring.take();
    agent.add_once([this, job, tile] { machine.begin_read(jobs[job], tile); });
    agent.add([this, place, &warp] {
      return q_full[place.index][warp.group].passes(place.full_parity());
    });
    auto const [first, end] = tiles[tile].seen[warp.group];
    int const hidden_right = tiles[tile].blocks - end, hidden_left = first;
    pass(agent, warp, 2 * hidden_right - int(first < end), Fault::kShortPassRight);
    if (first < end) {
      int block = end - 1;
      int k     = scores(agent, warp, place.index, tile, block);
      pass(agent, warp, min_of(hidden_right, 1));
      end_scores(agent, warp, k, place.index, tile, block);
      release(agent, warp);
      while (--block >= first) {
        k           = scores(agent, warp, place.index, tile, block);
        int const v = take_stage(agent, warp, name_of(Matrix::kV, tile, block + 1));
        end_scores(agent, warp, k, place.index, tile, block);
        end_stage(agent, v, name_of(Matrix::kV, tile, block + 1));
      }
      pass(agent, warp, min_of(hidden_left, 1));
      int const v = name_of(Matrix::kV, tile, first);
      end_stage(agent, take_stage(agent, warp, v), v);
      pass(agent, warp, 2 * hidden_left - 1, Fault::kShortPassLeft);
    }
    store(agent, warp, place.index, tile);
    agent.add_once(
        [this, job, tile] { machine.end_read(jobs[job], tile), job_empty[job].arrive(); });
    return true;
  }

  // is_short: the fault with which one stage too few passes by.
  void pass(Agent& agent, Warp& warp, int stages, Fault is_short = Fault::kNone) {
    if (is_short != Fault::kNone && fault == is_short) { --stages; }
    for (int i = 0; i < stages; ++i) {
      auto const place = warp.stage_ring.take();
      agent.add([this, place] {
        return fault == Fault::kNoPassWait || stage_full[place.index].passes(place.full_parity());
      });
      agent.add_once([this, place] { stage_empty[place.index].arrive(); });
    }
  }
  int take_stage(Agent& agent, Warp& warp, int content) {
    auto const place = warp.stage_ring.take();
    agent.add([this, place] {
      return fault == Fault::kNoFullWait || stage_full[place.index].passes(place.full_parity());
    });
    agent.add_once([this, place, content] { machine.begin_read(stages[place.index], content); });
    return place.index;
  }
  void end_stage(Agent& agent, int stage, int content) {
    agent.add_once([this, stage, content] {
      machine.end_read(stages[stage], content), stage_empty[stage].arrive();
    });
  }
  int scores(Agent& agent, Warp& warp, int buffer, int tile, int block) {
    int const stage = take_stage(agent, warp, name_of(Matrix::kK, tile, block));
    agent.add_once([this, buffer, tile, &warp] {
      machine.begin_read(q[buffer][warp.group], name_of(Matrix::kQ, tile));
    });
    return stage;
  }
  void end_scores(Agent& agent, Warp& warp, int stage, int buffer, int tile, int block) {
    agent.add_once([this, buffer, tile, &warp] {
      machine.end_read(q[buffer][warp.group], name_of(Matrix::kQ, tile));
    });
    end_stage(agent, stage, name_of(Matrix::kK, tile, block));
  }

  // As epilogue.cuh.
  void store(Agent& agent, Warp& warp, int buffer, int tile) {
    release(agent, warp);
    sync_group(agent, warp);
    int const output = name_of(Matrix::kO, tile);
    // The four warps write rows of their own: the first one stands for the write, all see who reads.
    agent.add_once([this, &warp, buffer, output] {
      Buffer& place = q[buffer][warp.group];
      if (place.readers > 0) { machine.fail("O is written while somebody reads Q"); }
      place.content = output;
    });
    sync_group(agent, warp);
    if (warp.number == 0) {
      agent.add_once([this, &warp, buffer, output, tile] {
        Buffer& place = q[buffer][warp.group];
        machine.begin_read(place, output), ++stores[warp.group];
        machine.in_flight.push_back([this, &place, &warp, output, tile] {
          machine.end_read(place, output), --stores[warp.group], ++outputs[tile];
        });
      });
    }
    warp.stored_from = buffer;
    if (kQBuffers == 1) { release(agent, warp); }
  }
  void release(Agent& agent, Warp& warp) {
    if (warp.stored_from >= 0 && warp.number == 0) {
      agent.add([this, &warp] { return fault == Fault::kEarlyRelease || stores[warp.group] == 0; });
      agent.add_once(
          [this, from = warp.stored_from, &warp] { q_empty[from][warp.group].arrive(); });
    }
    warp.stored_from = -1;
  }
  void sync_group(Agent& agent, Warp& warp) {
    agent.add_once([this, &warp] { group_barriers[warp.group].arrive(); });
    agent.add([this, &warp, parity = warp.group_parity] {
      return group_barriers[warp.group].passes(parity);
    });
    warp.group_parity ^= 1;
  }
};

// How often a group has passed over blocks on the right, on the left, on both sides, over all of them.
int passed_right = 0, passed_left = 0, passed_both = 0, passed_all = 0;

// All blocks, none, or any range; no blocks are those before the first one, as in a job.
Seen draw_seen(int blocks, Random& draw) {
  int const kind = below(draw, 6);
  if (kind < 2 || blocks == 0) { return {0, blocks}; }
  if (kind == 2) { return ++passed_all, Seen{0, 0}; }
  int const first = below(draw, blocks), end = first + 1 + below(draw, blocks - first);
  bool const right = end < blocks, left = first > 0;
  passed_right += right && !left, passed_left += left && !right, passed_both += right && left;
  return {first, end};
}

template <int kStages, int kQBuffers>
std::string run_forward(int groups, Fault fault, int most_tiles, Random& draw) {
  std::vector<Tile> tiles(below(draw, most_tiles + 1));
  for (Tile& tile : tiles) {
    tile.blocks = std::vector<int>{0, 0, 1, 1, 2, 3, 7}[below(draw, 7)];
    for (int group = 0; group < groups; ++group) {
      tile.seen.push_back(draw_seen(tile.blocks, draw));
    }
  }
  return Forward<kStages, kQBuffers>(tiles, groups, fault, draw).run();
}

template <int kStages, int kQBuffers>
void check_forward(int groups, Random& draw) {
  for (int i = 0; i < 60; ++i) {
    auto const wrong = run_forward<kStages, kQBuffers>(groups, Fault::kNone, 9, draw);
    expect(wrong.empty(), "%d stages, %d Q buffers, %d groups: %s", kStages, kQBuffers, groups,
           wrong.c_str());
  }
  for (Fault fault :
       {Fault::kNoFullWait, Fault::kNoEmptyWait, Fault::kFewReleases, Fault::kEarlyRelease,
        Fault::kNoPassWait, Fault::kShortPassRight, Fault::kShortPassLeft}) {
    bool found = false;
    for (int i = 0; i < 200 && !found; ++i) {
      found = !run_forward<kStages, kQBuffers>(groups, fault, 9, draw).empty();
    }
    expect(found, "%d stages, %d Q buffers, %d groups: fault %d is not found", kStages, kQBuffers,
           groups, int(fault));
  }
}

int main() {
  Random draw(1);
  check_ring<1>(draw), check_ring<2>(draw), check_ring<3>(draw), check_ring<4>(draw);
  check_ring<5>(draw), check_ring<6>(draw), check_ring<7>(draw), check_ring<8>(draw);
  check_forward<8, 2>(3, draw);  // head dimension 64
  check_forward<7, 2>(2, draw), check_forward<5, 2>(2, draw);
  check_forward<4, 1>(2, draw), check_forward<5, 1>(2, draw);
  check_forward<8, 2>(2, draw);  // this and the next two are no tile's
  check_forward<2, 1>(2, draw), check_forward<3, 2>(3, draw);
  std::printf("groups passed over blocks on the right %d, left %d, both sides %d, all %d times\n",
              passed_right, passed_left, passed_both, passed_all);
  expect(passed_right && passed_left && passed_both && passed_all,
         "some way of passing is missing");
  return check::finish();
}
