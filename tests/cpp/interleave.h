#pragma once
// Random interleavings: agents that do one thing after another, mbarriers between them, buffers that say who may not touch them now.
#include <deque>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace interleave {

using Random = std::mt19937;
int below(Random& draw, int n) { return int(draw() % unsigned(n)); }

// An mbarrier: a phase ends with its last arrival.  A wait for a parity passes once the phase of that parity is over, a fresh barrier
// counting as one whose phase of parity 1 is.
struct Barrier {
  int count;
  int missing    = count;
  unsigned phase = 0;

  explicit Barrier(int count_ = 1) : count(count_) {}
  void arrive() {
    if (--missing == 0) { missing = count, ++phase; }
  }
  bool passes(uint32_t parity) const { return (phase & 1) != parity; }
};

// A buffer of a ring, or a part of one.
struct Buffer {
  int content = -1, readers = 0;
  bool is_written = false;  // a load is under way
};

// An agent does one thing after another; one that cannot be done yet says false and is asked again.
using Action = std::function<bool()>;
struct Agent {
  std::deque<Action> actions;
  std::function<bool()> refill = [] { return false; };  // more actions; false: that was all

  void add(Action action) { actions.push_back(std::move(action)); }
  void add_once(std::function<void()> action) {
    add([action = std::move(action)] { return action(), true; });
  }
  bool is_done() {
    while (actions.empty()) {
      if (!refill()) { return true; }
    }
    return false;
  }
};

class Machine {
 public:
  std::string wrong;  // the first thing that went wrong
  std::vector<Agent> agents;
  std::vector<std::function<void()>> in_flight;  // what TMA does at some time, in any order

  Machine(int count, Random& draw_) : agents(count), draw(draw_) {}

  void fail(char const* what) {
    if (wrong.empty()) { wrong = what; }
  }
  void begin_write(Buffer& buffer) {
    if (buffer.is_written) { fail("two loads into one buffer"); }
    if (buffer.readers > 0) { fail("a write while somebody reads"); }
    buffer.is_written = true, buffer.content = -1;
  }
  void end_write(Buffer& buffer, int content) {
    if (buffer.readers > 0) { fail("a write while somebody reads"); }
    buffer.is_written = false, buffer.content = content;
  }
  void begin_read(Buffer& buffer, int content) {
    if (buffer.is_written) { fail("a read while a load is under way"); }
    if (buffer.content != content) { fail("a read of another use"); }
    ++buffer.readers;
  }
  void end_read(Buffer& buffer, int content) {
    if (buffer.content != content) { fail("overwritten while somebody reads"); }
    --buffer.readers;
  }
  void load(Buffer& buffer, int content, Barrier& full) {
    begin_write(buffer);
    in_flight.push_back(
        [this, &buffer, content, &full] { end_write(buffer, content), full.arrive(); });
  }

  // Until all agents are done.  Some are much slower than others, TMA too.
  void run() {
    std::vector<int> weights(agents.size() + 1);
    for (int& weight : weights) { weight = 1 + below(draw, 1 << below(draw, 7)); }
    std::discrete_distribution<int> pick(weights.begin(), weights.end());
    for (int idle = 0; wrong.empty();) {
      if (advance(pick(draw))) {
        idle = 0;
      } else if (++idle > 50) {  // perhaps nothing can go on
        bool any = false, done = in_flight.empty();
        for (int i = 0; i <= int(agents.size()) && !any; ++i) { any = advance(i); }
        for (Agent& agent : agents) { done = agent.is_done() && done; }
        if (any) { continue; }
        if (!done) { fail("deadlock"); }
        return;
      }
    }
  }

 private:
  Random& draw;

  bool advance(int who) {
    if (who == int(agents.size())) {
      if (in_flight.empty()) { return false; }
      std::swap(in_flight[below(draw, int(in_flight.size()))], in_flight.back());
      auto const land = in_flight.back();
      in_flight.pop_back();
      land();
      return true;
    }
    Agent& agent = agents[who];
    if (agent.is_done() || !agent.actions.front()()) { return false; }
    agent.actions.pop_front();
    return true;
  }
};

}  // namespace interleave
